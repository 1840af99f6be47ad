"""The activation of the feed-forward for input rows is a choice of every model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, refused

from adatape_kernels import ElasticBatch, scenic
from adatape_kernels.models import (
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
    adatape_vit,
)
from adatape_kernels.op_types import ACTIVATIONS
from adatape_kernels.ops.op import record
from adatape_kernels.recipes.training.train_config import TrainConfig

SIZES = {"dim": 24, "depth": 2, "num_heads": 3, "ffn_dim": 48, "tape_ffn_dim": 16, "topk": 3}
VIT = AdaTapeViTConfig(
    num_classes=7, image_size=16, patch_size=8, bank_patch_size=4, num_tape_tokens=5, **SIZES
)
PARITY = AdaTapeParityConfig(num_classes=2, seq_len=20, num_tape_tokens=6, **SIZES)
TORCH = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def build(kind, config, activation):
    torch.manual_seed(0)
    model = kind(dataclasses.replace(config, activation=activation))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of(kind):
    if kind is AdaTapeViT:
        return torch.randn(6, 3, 16, 16)
    return F.one_hot(torch.randint(3, (6, 20)), 3).float()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("changes", [{}, {"tape_ffn_dim": 0}], ids=["own tape FFN", "shared"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("kind", "config"), [(AdaTapeViT, VIT), (AdaTapeParity, PARITY)], ids=["vit", "parity"]
)
def test_the_elastic_model_equals_the_padded_one(kind, config, activation, changes, training):
    model = build(kind, dataclasses.replace(config, **changes), activation).train(training)
    inputs, labels = inputs_of(kind), torch.tensor([0, 1, 0, 1, 1, 0])
    found = []
    for each in (model, model.padded()):
        model.zero_grad()
        output = each(inputs)
        each.loss(output, labels).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((output.logits.detach(), gradients))
    (logits, grads), (other_logits, other_grads) = found
    assert_close(logits, other_logits, 1e-5)
    for name, grad in other_grads.items():
        assert_close(grads[name], grad, 1e-4)


def test_the_activations_differ_and_the_default_is_gelu_tanh():
    inputs = inputs_of(AdaTapeViT)
    logits = {name: build(AdaTapeViT, VIT, name)(inputs).logits for name in ACTIVATIONS}
    assert len({tuple(each.flatten().tolist()) for each in logits.values()}) == 3
    torch.manual_seed(0)
    assert VIT.activation == PARITY.activation == "gelu_tanh"
    assert adatape_vit("Ti/4", image_size=8, depth=1).config.activation == "gelu_tanh"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_computes_it(activation):
    model = build(AdaTapeViT, VIT, activation).eval()
    for layer in model.encoder.layers:
        x = torch.randn(5, VIT.dim)
        batch = ElasticBatch.from_padded(x.unsqueeze(0))
        expected = layer.linear2(TORCH[activation](layer.linear1(x)))
        assert_close(layer.feed_forward(batch).data, expected.detach(), 1e-6)


def test_the_name_reaches_the_op():
    model = adatape_vit("Ti/4", image_size=8, depth=2, num_classes=3, activation="relu").eval()
    with record() as ran:
        model(torch.zeros(1, 3, 8, 8))
    assert [call.op for call in ran].count("dual_ffn") == 2


def test_an_unknown_name_is_refused():
    with refused("activation", "'gelu_tanh' or 'gelu' or 'relu'", "'silu'"):
        adatape_vit("Ti/4", activation="silu")


def test_a_configuration_goes_through_a_dictionary():
    config = dataclasses.replace(VIT, activation="gelu")
    assert AdaTapeViTConfig(**dataclasses.asdict(config)) == config
    trained = TrainConfig.of({"data": "digits", "activation": "relu"})
    assert trained.vit_config(10, 1).activation == "relu"
    assert TrainConfig.of_saved(dataclasses.asdict(trained)) == trained


def test_scenic_s_models_have_scenic_s():
    path = "tests/golden/vit_input_token.npz"
    config = scenic.read_config(scenic.read_npz(path), path)
    assert scenic.model_config(config).activation == "gelu_tanh"
