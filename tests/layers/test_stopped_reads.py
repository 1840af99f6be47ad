"""A threshold in a tensor reads what the same number does, and asks the host for nothing."""

import math

import pytest
import torch

import adatape_kernels as ak
from adatape_kernels.layers import recomputed_bank
from adatape_kernels.layers.stopped_reads import stopped_at
from adatape_kernels.op_types import TapeSelection

THRESHOLDS = [-1.0, 0.0, 0.4, 0.9, 1.3, math.inf]


def model_and_images(**options):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "num_classes": 5, "dim": 16, "num_heads": 2, "ffn_dim": 16}
    sizes |= {"depth": 2, "read_layers": (0, 1), "num_tape_tokens": 5, "topk": 3, **options}
    model = ak.models.adatape_vit("Ti/4", bank_patch_size=2, **sizes)
    torch.nn.init.normal_(model.head.weight)
    return model, torch.randn(6, 3, 8, 8), torch.arange(6) % 5


def step(model, images, labels, **limits):
    model.zero_grad()
    output = model(images, **limits)
    model.loss(output, labels).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bank": "learn", "bank_size": 16}, {"loss_type": "max"}])
@pytest.mark.parametrize("rows", ["all", "read"])
def test_a_tensor_reads_what_the_number_does(options, rows, monkeypatch):
    if rows == "read":
        monkeypatch.setattr(recomputed_bank, "LEAST_FROM_PATCHES_ON_CPU", 1)
        monkeypatch.setattr(recomputed_bank, "LARGEST_SHARE", 1.0)
    model, images, labels = model_and_images(**options)
    for number in THRESHOLDS:
        threshold = torch.tensor(number)
        expected, theirs = step(model, images, labels, halt_threshold=number, capacity=30)
        output, ours = step(model, images, labels, halt_threshold=threshold, capacity=30)
        for read, as_expected in zip(output.reads, expected.reads, strict=True):
            assert torch.equal(read.indices, as_expected.indices)
            assert torch.equal(read.weights, as_expected.weights)
            assert torch.equal(read.counts, as_expected.counts)
            torch.testing.assert_close(read.ponder, as_expected.ponder)
        assert torch.equal(output.logits, expected.logits)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], msg=name)
        exact = model(images, halt_threshold=threshold)
        torch.testing.assert_close(exact.logits, expected.logits, rtol=1e-4, atol=1e-4)
    padded = model.padded()(images, halt_threshold=torch.tensor(0.9))
    assert torch.equal(padded.tape_lens, model(images, halt_threshold=0.9).tape_lens)


def test_steps_are_cut_as_the_specification_says():
    weights = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], [[0.9, 0.1], [0, 0], [0, 0]]])
    indices = torch.tensor([[[4, 1], [0, 2], [3, 5]], [[2, 0], [-1, -1], [-1, -1]]]).int()
    whole = TapeSelection(indices, weights, torch.tensor([3, 1]).int(), torch.zeros(2))
    for threshold, taken in ((0.0, [0, 0]), (0.5, [1, 1]), (1.2, [2, 1]), (9.0, [3, 1])):
        found = stopped_at(whole, torch.tensor(threshold), "entropy")
        assert found.counts.tolist() == taken and found.counts.dtype == torch.int32
        for example, steps in enumerate(taken):
            assert torch.equal(found.indices[example, :steps], indices[example, :steps])
            assert (found.indices[example, steps:] == -1).all()
            assert (found.weights[example, steps:] == 0).all()
            cost = sum(1 - float(w.square().sum()) for w in weights[example, :steps])
            assert math.isclose(found.ponder[example], cost, abs_tol=1e-6)
    nothing = TapeSelection(indices[:, :0], weights[:, :0], torch.zeros(2).int(), torch.zeros(2))
    assert stopped_at(nothing, torch.tensor(1.0), "max") is nothing


def test_a_score_that_is_no_number_ends_a_read():
    weights = torch.tensor([[[0.5], [math.nan], [0.5]]])
    whole = TapeSelection(torch.zeros(1, 3, 1).int(), weights, torch.tensor([2]).int(), None)
    assert stopped_at(whole, torch.tensor(math.inf), "max").counts.tolist() == [2]


@pytest.mark.parametrize("wrong", [torch.ones(1), torch.tensor(2), torch.ones(2, 2)])
def test_other_tensors_are_refused(wrong):
    model, images, _ = model_and_images()
    words = "^halt_threshold: expected a number or a floating-point scalar tensor, got "
    with pytest.raises(ValueError, match=words):
        model(images, halt_threshold=wrong)
