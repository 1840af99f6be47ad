"""The padded model beside an elastic one whose parameters are made in hooks of calls."""

import pytest
import torch
from checks import assert_close
from torch import nn
from torch.nn.utils import prune

import adatape_kernels as ak

OLD_NORM = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def made(reparametrise, path, name, bank="learn"):
    torch.manual_seed(3)
    options = {"bank": bank, "num_classes": 4, "image_size": 16, "depth": 2, "halt_threshold": 1.2}
    options |= {"dim": 16, "num_heads": 2, "ffn_dim": 24, "tape_ffn_dim": 8, "topk": 2}
    model = ak.models.adatape_vit("Ti/4", bank_size=30, num_tape_tokens=4, **options)
    nn.init.normal_(model.head.weight, std=0.3)
    reparametrise(model.get_submodule(path), name)
    return model


def trained(called, model, steps=3):
    """Return the logits of each step, and the gradients of the last one."""
    images, labels = (
        torch.linspace(-2, 2, 3 * 768).view(3, 3, 16, 16).sin(),
        torch.tensor([0, 3, 1]),
    )
    optimiser, logits = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimiser.zero_grad()
        output = called(images)
        model.loss(output, labels).backward()
        optimiser.step()
        logits.append(output.logits.detach())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(logits), grads


@pytest.mark.parametrize(
    ("reparametrise", "path", "name"),
    [
        (lambda m, n: prune.l1_unstructured(m, n, 0.5), "encoder.layers.0.self_attn", weight)
        for weight in ("in_proj_weight", "in_proj_bias")
    ]
    + [
        pytest.param(
            nn.utils.weight_norm, "encoder.layers.1.self_attn", "in_proj_weight", marks=OLD_NORM
        ),
        (lambda m, n: prune.random_structured(m, n, 0.3, 0), "encoder.readers.0", "tape_tokens"),
        (lambda m, n: prune.l1_unstructured(m, n, 0.3), "encoder.readers.0.bank_norm", "weight"),
        (lambda m, n: prune.l1_unstructured(m, n, 0.3), "encoder.layers.0.tape_linear1", "weight"),
        (lambda m, n: prune.l1_unstructured(m, n, 0.3), "head", "weight"),
    ],
)
def test_the_padded_model_trains_alone_and_as_the_elastic_one(reparametrise, path, name):
    elastic, other = (made(reparametrise, path, name) for _ in range(2))
    expected, expected_grads = trained(elastic, elastic)
    actual, grads = trained(other.padded(), other)
    assert grads.keys() == expected_grads.keys()
    assert not torch.equal(actual[0], actual[1])
    assert_close(actual, expected, 1e-4)
    for key, grad in grads.items():
        assert_close(grad, expected_grads[key], 1e-3)


def test_a_norm_of_an_old_kind_is_made_in_both():
    model = made(nn.utils.spectral_norm, "encoder.layers.0.self_attn", "in_proj_weight").eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(model.padded()(images).logits, model(images).logits, 1e-4)
        before = model.encoder.layers[0].self_attn.in_proj_weight.clone()
        model.encoder.layers[0].self_attn.in_proj_weight_orig[0, 0] += 10
        model.padded()(images)
    assert not torch.equal(before, model.encoder.layers[0].self_attn.in_proj_weight)
