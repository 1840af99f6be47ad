"""Models that AdaTape is compared with in timm's registry, and the protocol beside its ViT."""

import doctest
import re

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, refused

import adatape_kernels as ak
from adatape_kernels.models.timm_protocol import PonderLoss, TimmAdaTape, TimmClassifier

SIZES = {"dim": 24, "num_heads": 2, "ffn_dim": 32, "depth": 3, "num_classes": 5}
NAMES = (
    "avit_tiny_patch16_224",
    "uvit_small_patch16",
    "u2t_base_patch32",
    "uvit_large_patch16_224",
)
IMAGES, LABELS = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])


def protocol_of(name, drop_rate=0.0, **options):
    model = ak.models.create_model(name, image_size=64, **{**SIZES, **options})
    torch.nn.init.normal_(model.head.weight)
    return TimmClassifier(model, drop_rate=drop_rate)


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"representation_size": 7}], ids=str)
@pytest.mark.parametrize("name", ["avit_tiny_patch16_224", "uvit_tiny_patch16_224"])
def test_it_computes_what_the_model_does(name, options):
    model = protocol_of(name, **options)
    expected = model.model(IMAGES)
    assert_close(model(IMAGES), expected.logits, 1e-6)
    assert torch.equal(model.last_output.halted.steps, expected.halted.steps)
    features = model.forward_features(IMAGES)
    assert_close(model.forward_head(features), expected.logits, 1e-6)
    hidden, head = model.forward_head(features, pre_logits=True), model.get_classifier()
    assert hidden.shape[1] == model.head_hidden_size
    assert_close(F.linear(hidden, head.weight, head.bias), expected.logits, 1e-6)
    criterion = PonderLoss(model, torch.nn.CrossEntropyLoss())
    loss = criterion(model(IMAGES), LABELS)
    assert_close(loss, model.model.loss(model.model(IMAGES), LABELS), 1e-6)
    assert not [*criterion.parameters()]
    model.reset_classifier(3)
    assert model(IMAGES).shape == (4, 3)


@pytest.mark.no_backend
def test_what_is_no_model_of_images_is_refused():
    for wrong in (torch.nn.Linear(2, 2), ak.models.create_model("transformer_tiny", depth=1), None):
        with refused("model", "ImageClassifier", error=TypeError):
            TimmClassifier(wrong)
    with refused("adatape", "AdaTapeViT", "ViT", error=TypeError):
        TimmAdaTape(ak.models.create_model("vit_tiny_patch16_224", depth=1))
    for test in doctest.DocTestFinder(recurse=False).find(TimmClassifier, "", globs={}):
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0


@pytest.fixture(scope="module")
def registry():
    registered = pytest.importorskip("timm", reason="timm is not installed")
    import adatape_kernels.timm

    assert adatape_kernels.timm.__all__
    return registered


def test_timm_lists_and_makes_them(registry):
    numbers = {kind: len(registry.list_models(f"{kind}_*")) for kind in ("avit", "uvit", "u2t")}
    assert numbers == {"avit": 8, "uvit": 16, "u2t": 16}
    assert registry.list_models("uvit*", pretrained=True) == []
    with torch.device("meta"):
        tiny = registry.create_model("avit_tiny_patch16_224", num_classes=10).model
        small = registry.create_model("avit_small_patch32", num_classes=10).model
    assert (tiny.config.dim, tiny.config.gate_center, tiny.config.patch_size) == (192, 30, 16)
    assert (small.config.dim, small.config.gate_center, small.config.patch_size) == (384, 75, 32)
    assert not registry.is_model("vit_tiny_patch16") and registry.is_model("vit_tiny_patch16_224")


@pytest.mark.parametrize("name", NAMES)
def test_options_are_timm_s_or_ours(registry, name):
    from timm.data import resolve_model_data_config

    options = {"in_chans": 1, "img_size": (64, 64), "drop_path_rate": 0.1, "global_pool": "avg"}
    model = registry.create_model(name, **SIZES, **options, act_epsilon=0.2, dtype=torch.float64)
    config = model.model.config
    assert (config.in_channels, config.image_size, config.stochastic_depth) == (1, 64, 0.1)
    assert config.pooling == "mean" and config.act_epsilon == 0.2
    assert len(model.model.encoder.layers) == (2 if name.startswith("u2t") else 3)
    assert model(torch.randn(2, 1, 64, 64, dtype=torch.float64)).shape == (2, 5)
    assert resolve_model_data_config(model)["input_size"] == (1, 64, 64)
    with refused("options", "'halt_threshold'"):
        registry.create_model(name, halt_threshold=2.0)
    with refused("pretrained", "no weights"):
        registry.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", NAMES[:2])
def test_timm_trains_it(registry, name, tmp_path):
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask

    model = registry.create_model(name, **SIZES, img_size=64).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.7)
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert id(model.model.position) not in decayed and id(model.model.head.weight) in decayed
    criterion = PonderLoss(model, LabelSmoothingCrossEntropy(0.1))
    task = ClassificationTask(model, criterion=criterion, device=torch.device("cpu"))
    losses = []
    for _ in range(6):
        result = task(IMAGES, LABELS)
        losses.append(result["loss"].item())
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    again = registry.create_model(name, **SIZES, img_size=64, checkpoint_path=path).eval()
    assert_close(again(IMAGES), model.eval()(IMAGES), 1e-6)
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    grey = registry.create_model(
        name, **{**SIZES, "num_classes": 3}, **source, img_size=64, in_chans=1
    )
    colour = model.model.patch_embed.weight.sum(1, keepdim=True)
    assert_close(grey.model.patch_embed.weight, colour, 1e-5)


def test_every_method_and_attribute_of_timm_s_vit_is_there(registry):
    """Of timm's VisionTransformer, those that its scripts ask any model for."""
    theirs = registry.create_model("test_vit", img_size=64, num_classes=5)
    model = registry.create_model(NAMES[0], **SIZES, img_size=64)
    names = "num_classes num_features embed_dim head_hidden_size num_prefix_tokens global_pool "
    names += "feature_info pretrained_cfg default_cfg forward_features forward_head get_classifier "
    names += "reset_classifier no_weight_decay set_grad_checkpointing group_matcher"
    for name in names.split():
        if name == "default_cfg" and not hasattr(theirs, name):
            continue
        ours, of_vit = getattr(model, name), getattr(theirs, name)
        assert callable(ours) == callable(of_vit), name
        if isinstance(of_vit, int | str):
            assert type(ours) is type(of_vit), name
    assert model.feature_info[0].keys() == theirs.feature_info[0].keys()
    assert type(model.no_weight_decay()) is set
    assert model.group_matcher().keys() == theirs.group_matcher().keys()
    assert re.match(model.group_matcher()["stem"], "model.patch_embed.weight")
