"""Our models in timm's registry, and timm's own way of training them."""

import sys

import pytest
import torch
from checks import assert_close, refused

import adatape_kernels as ak

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

import timm
from timm.data import resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3

import adatape_kernels.timm
from adatape_kernels.timm import PonderLoss, TimmAdaTape

SIZES = {"img_size": 32, "patch_size": 8, "dim": 24, "num_heads": 2, "ffn_dim": 32, "depth": 2}
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])


def create(name="adatape_vit_small_patch16", **options):
    return timm.create_model(name, **{**SIZES, "topk": 2, "num_classes": 5, **options})


def test_timm_lists_the_models():
    names = timm.list_models("adatape*")
    assert len(names) == 16
    assert {"adatape_vit_tiny_patch16_224", "adatape_vit_small_patch16"} <= set(names)
    assert timm.list_models("adatape*", pretrained=True) == []
    assert set(names) <= set(adatape_kernels.timm.__all__)


def test_a_name_means_the_paper_s_sizes():
    with torch.device("meta"):
        model = timm.create_model("adatape_vit_base_patch32_224", num_classes=10, bank="input")
    config = model.adatape.config
    assert (config.dim, config.patch_size, config.bank_patch_size) == (768, 32, 16)
    assert (model.num_classes, config.image_size, model.num_features) == (10, 224, 768)
    assert resolve_model_data_config(model)["input_size"] == (3, 224, 224)


def test_options_are_timm_s_or_ours():
    model = create(
        in_chans=1,
        img_size=(16, 16),
        drop_path_rate=0.1,
        proj_drop_rate=0.2,
        attn_drop_rate=0.3,
        drop_rate=0.4,
        global_pool="avg",
        num_tape_tokens=3,
        dtype=torch.float64,
    )
    config = model.adatape.config
    assert (config.in_channels, config.image_size, config.bank_patch_size) == (1, 16, 4)
    assert (config.stochastic_depth, config.dropout) == (0.1, 0.2)
    assert (config.attention_dropout, model.drop_rate) == (0.3, 0.4)
    assert (config.pooling, config.query, config.num_tape_tokens) == ("mean", "gap", 3)
    assert model(torch.randn(2, 1, 16, 16, dtype=torch.float64)).shape == (2, 5)
    assert resolve_model_data_config(model)["input_size"] == (1, 16, 16)
    assert create(num_classes=0)(IMAGES).shape == (4, 24)
    for wrong, parts in (
        ({"pretrained": True}, ("pretrained", "there are no weights of adatape_vit_small_patch16")),
        ({"features_only": True}, ("features_only", "got True")),
        ({"global_pool": "map"}, ("global_pool", "token, avg, max, sum", "got 'map'")),
        ({"img_size": (32, 16)}, ("img_size", "a square", "got (32, 16)")),
        ({"image_size": 32}, ("img_size", "none beside image_size", "got 32")),
        ({"qkv_bias": True}, ("options", "got 'qkv_bias'")),
    ):
        with refused(*parts):
            create(**wrong)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timm_trains_it(layer_decay):
    model = create(ponder_weight=0.5).train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert id(model.adatape.position) not in decayed and id(model.adatape.head.weight) in decayed
    criterion = PonderLoss(model, LabelSmoothingCrossEntropy(0.1))
    task = ClassificationTask(model, criterion=criterion, device=torch.device("cpu"))
    average = ModelEmaV3(model, decay=0.5)
    losses = []
    for _ in range(8):
        result = task(IMAGES, LABELS)
        assert result["output"].shape == (4, 5)
        losses.append(result["loss"].item())
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        average.update(model)
    assert losses[-1] < losses[0]
    assert average.module(IMAGES).shape == (4, 5)


def test_timm_s_checkpoints_load(tmp_path):
    model = create()
    torch.nn.init.normal_(model.get_classifier().weight)
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    expected = model.eval()(IMAGES)
    assert_close(create(checkpoint_path=path).eval()(IMAGES), expected, 1e-6)
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    assert_close(create(**source).eval()(IMAGES), expected, 1e-6)
    grey = create(**source, in_chans=1, num_classes=3)
    for name in ("patch_embed", "bank_embed"):
        colour = getattr(model.adatape, name).weight.sum(1, keepdim=True)
        assert_close(getattr(grey.adatape, name).weight, colour, 1e-5)


def test_a_converted_vit_follows_the_protocol():
    theirs = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    model = TimmAdaTape(ak.models.from_timm(theirs, halt_threshold=0))
    assert_close(model(IMAGES), theirs(IMAGES), 1e-4)


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "adatape_kernels.timm")
    with pytest.raises(ImportError, match=r"^adatape_kernels\.timm: expected timm, .*`pip install"):
        import adatape_kernels.timm  # noqa: F401
