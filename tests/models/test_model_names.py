"""Models by name, and what all of them have: timm's methods, files, outputs, and a printed form."""

import dataclasses
import re

import pytest
import torch
from checks import refused
from torch.utils import _pytree as pytree

import adatape_kernels as ak
from adatape_kernels import models
from adatape_kernels.cli import main

SMALL = {"num_classes": 3, "dim": 16, "depth": 3, "num_heads": 2, "ffn_dim": 24}
KINDS = {
    "vit_tiny_patch16_224": {"image_size": 32, "in_channels": 1},
    "uvit_base_patch16_224": {"image_size": 32, "in_channels": 1},
    "u2t_small_patch16_224": {"image_size": 32, "in_channels": 1, "act_level": "row"},
    "avit_tiny_patch16_224": {"image_size": 32, "in_channels": 1},
    "adatape_small_patch16_224": {"image_size": 32, "in_channels": 1, "topk": 2},
    "transformer_tiny": {},
    "universal_transformer_tiny": {},
    "adatape_parity_tiny": {},
}


def build(name, **options):
    torch.manual_seed(3)
    model = models.create_model(name, **{**SMALL, **KINDS[name], **options}).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def inputs_of(model, batch=3):
    if isinstance(model, models.ImageClassifier):
        return torch.randn(batch, 1, 32, 32)
    return torch.randn(batch, 40, 3)


def test_names():
    names = models.list_models()
    assert names == sorted(names) and len(names) == len(set(names)) > 40
    for name in KINDS:
        assert name in names or f"{name}.input" in names
    assert models.list_models("uvit_*") == [n for n in names if n.startswith("uvit_")]
    assert models.list_models("nothing*") == []
    with refused("filter", error=TypeError):
        models.list_models(3)


@pytest.mark.parametrize("name", models.list_models())
def test_every_name_is_a_model(name):
    with torch.device("meta"):
        model = models.create_model(name, num_classes=7, depth=2)
    assert model.num_classes == 7 and model.config.depth == 2
    bank = name.partition(".")[2]
    assert not bank or model.config.bank == bank


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("uvit_base_patch16", "uvit_base_patch16_224"),
        ("avit_tiny_patch8_224", "avit_tiny_patch16_224"),
        ("adatape_small_patch16_224.both", "adatape_small_patch16_224.input"),
        ("", "list_models"),
        (None, "list_models"),
        ("resnet50", "list_models"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name, near):
    with refused("name", near):
        models.create_model(name)


@pytest.mark.parametrize("name", ["uvit_tiny_patch16_224", "transformer_tiny"])
def test_an_unknown_option_is_refused(name):
    with refused("options", "halt_threshold"):
        models.create_model(name, halt_threshold=2)


@pytest.mark.parametrize("name", KINDS)
def test_timm_s_methods(name):
    model = build(name)
    given = inputs_of(model)
    features = model.forward_features(given)
    assert isinstance(features, ak.ElasticBatch)
    assert torch.equal(model.forward_head(features), model(given).logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.num_features) and model.embed_dim == 16
    assert torch.equal(model.head(pooled), model(given).logits)
    assert model.get_classifier() is model.head
    assert len(model.feature_info) == len(model.encoder.layers)
    own = dict(model.named_parameters())
    assert model.no_weight_decay() <= own.keys() and "class_token" in model.no_weight_decay()
    groups = model.group_matcher()
    for parameter in own:
        found = [re.match(groups["stem"], parameter)]
        found += [re.match(expression, parameter) for expression, _ in groups["blocks"]]
        assert sum(map(bool, found)) == (not parameter.startswith("head")), parameter
    model.class_names = ("a", "b", "c")
    model.reset_classifier(5)
    assert model(given).logits.shape == (3, 5) and model.class_names is None
    assert model.config.num_classes == model.num_classes == 5
    with refused("global_pool", "'token'"):
        model.reset_classifier(5, "avg")
    model.reset_classifier(0)
    assert torch.equal(model(given).logits, model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpointed_layer_gives_the_same_gradients(name):
    model = build(name).train()
    given, found = inputs_of(model), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.loss(model(given), torch.tensor([0, 1, 2])).backward()
        found.append(model.encoder.layers[0].linear1.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6)
    with refused("enable", error=TypeError):
        model.set_grad_checkpointing(1)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_comes_back(name, tmp_path):
    model = build(name)
    file = ak.save(model, tmp_path, class_names=["a", "b", "c"])
    loaded = ak.load(file)
    given = inputs_of(model)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert torch.equal(loaded(given).logits, model(given).logits)
    if not isinstance(model, models.AdaTape):
        with refused("halt_threshold"):
            ak.load(file, halt_threshold=0.5)


@pytest.mark.parametrize("name", KINDS)
def test_an_output_is_cut_and_moved(name):
    model = build(name)
    output = model(inputs_of(model))
    leaves, spec = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.ponder, output.ponder)
    assert len(output[1:]) == 2 and torch.equal(output[-1].logits, output.logits[2])
    double = output.detach().double()
    assert double.ponder.dtype == torch.float64 and output.to("cpu") is output
    if output.halted is not None:
        assert output.halted.rows_per_step
        cut = output[2]
        assert torch.equal(cut.halted.steps, output.halted.steps[2])
        assert double.halted.remainders.dtype == torch.float64
        assert double.halted.steps.dtype == torch.int32
        means = output.halted.means
        assert means is None or cut.halted.means.shape == (3,)
    assert len([*output]) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uvit_base_patch16_224", ["threshold=0.99", "num_heads=2", "halting=example"]),
        ("u2t_small_patch16_224", ["halting=row", "leave=example"]),
        ("avit_tiny_patch16_224", ["scale=10, center=30", "threshold=0.99", "num_classes=3"]),
        ("adatape_small_patch16_224", ["halt_threshold=2", "num_heads=2", "bank=input"]),
    ],
)
def test_a_printed_model_shows_thresholds_and_heads(name, words):
    text = str(build(name))
    for word in words:
        assert word in text, text


def test_gates_of_the_sizes():
    for size, center in (("tiny", 30.0), ("small", 75.0)):
        with torch.device("meta"):
            model = models.create_model(f"avit_{size}_patch16_224")
        assert model.encoder.gate.center == center and model.encoder.gate.scale == 10
        assert model.config.activation == "gelu" and model.config.pooling == "token"


@pytest.mark.parametrize("name", ["transformer_tiny", "universal_transformer_tiny"])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        (torch.zeros(2, 41, 3), ValueError),
        (torch.zeros(2, 0, 3), ValueError),
        (torch.zeros(2, 40, 4), ValueError),
        (torch.zeros(2, 40, 3).long(), ValueError),
        ([torch.zeros(4, 3), torch.zeros(4)], ValueError),
        ([torch.zeros(4, 3), torch.zeros(41, 3)], ValueError),
        ([torch.zeros(4, 3), 3], TypeError),
        ({"a": torch.zeros(4, 3)}, TypeError),
        (None, TypeError),
    ],
)
def test_sequences_that_do_not_fit(name, given, error):
    model = build(name)
    with pytest.raises(error, match=r"inputs(\[1\])?: expected .*, got ") as info:
        model(given)
    assert "\n" not in str(info.value)


def test_what_is_not_exported_is_refused_in_one_line(tmp_path, capsys):
    file = ak.save(build("uvit_base_patch16_224"), tmp_path)
    assert main(["export", str(file), "--out", str(tmp_path / "model.pt2")]) == 2
    error = capsys.readouterr().err
    assert "source: expected an AdaTape, got a model of UViT" in error and error.count("\n") == 1


def test_a_configuration_makes_one_model():
    config = models.UViTConfig(**SMALL, image_size=32)
    for model in (models.ViT, models.UViT):
        assert model(config).config is config  # a UViT's configuration is that of a ViT and more
    for model in (models.AViT, models.AdaTapeViT, models.Transformer, models.UniversalTransformer):
        with refused("config", error=TypeError):
            model(config)
    assert dataclasses.replace(config, depth=5).num_layers == 5
