"""A training step that is captured once and replayed is the step; a CUDA graph where a GPU is.

Elsewhere the graph is one that notes down what torch computes, on a GPU that is none.
"""

import dataclasses
import functools

import pytest
import torch
from checks import assert_same_bits
from fake_gpu import GPU, fake_gpu
from recorded_graph import RecordedGraph
from torch import nn

from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, augment, digits
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    ViT,
    ViTConfig,
)
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.training import graphed_step, train
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train as train_loop
from adatape_kernels.recipes.training.train_plan import TrainPlan

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SIZES = dict(num_classes=10, dim=16, num_heads=2, ffn_dim=16, image_size=8, in_channels=1)
TAPE = dict(tape_ffn_dim=8, num_tape_tokens=3, topk=2, patch_size=4)
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "bank_patch_size": 2, "depth": 1}),
    "learn": (
        AdaTapeViT,
        AdaTapeViTConfig,
        {**TAPE, "bank": "learn", "bank_size": 9, "depth": 2, "read_layers": (0, 1)},
    ),
    "vit": (ViT, ViTConfig, {"patch_size": 4, "depth": 1}),
}


def new_model(name, **further):
    made, config, options = MODELS[name]
    torch.manual_seed(0)
    model = made(config(**SIZES, **options, **further))
    nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def images():
    """Twenty-two digits: with batches of eight the last one has six."""
    data = digits(0)
    return dataclasses.replace(
        data, train_images=data.train_images[:22], train_labels=data.train_labels[:22]
    )


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphed_step, "StepGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    # A graph has its learning rate in float32.
    rate = TrainPlan.learning_rate_at
    monkeypatch.setattr(
        TrainPlan,
        "learning_rate_at",
        lambda *arguments: torch.tensor(rate(*arguments)).item(),
    )
    return RecordedGraph.made


def reserving(model):
    """Let a model reserve the rows of its worst case, where its batch is a full one."""
    forward = model.forward

    def reserved(pixels, **limits):
        if len(pixels) % 4 == 0:
            limits["capacity"] = 3 * len(pixels)
            if "halt_threshold" in limits:
                limits["halt_threshold"] = torch.tensor(limits["halt_threshold"])
        return forward(pixels, **limits)

    model.forward = reserved
    return model


def trained(model, images, plan, *, ema=0.0, device="cpu", execution=None, seed=3):
    """Train, and return the tensors and the curve that come of it."""
    torch.manual_seed(seed)
    model = model.to(device)
    optimizer, results = plan.optimizer(model), []
    averaged = averaged_model(model, ema) if ema else None
    train_loop(
        model,
        images,
        plan,
        Normaliser.of(images.train_images),
        augment.turn_and_move,
        optimizer=optimizer,
        averaged=averaged,
        after_epoch=lambda result: results.append((result.loss, result.accuracy)) or "",
        execution=execution,
    )
    tensors = {name: t.cpu() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name} {k}": v.cpu() for k, v in optimizer.state[parameter].items()}
    if averaged is not None:
        tensors |= {f"average {k}": v.cpu() for k, v in averaged.state_dict().items()}
    return tensors, results


CASES = {
    "adatape": ("adatape", {}, {}),
    "adatape drawn, mixed, averaged, clipped": (
        "adatape",
        {"mixup": 0.4, "halt_threshold_range": (0.0, 2.0), "max_grad_norm": 0.5},
        {"ema": 0.9},
    ),
    "learn drawn": ("learn", {"halt_threshold_range": (0.0, 2.0), "loss": "sigmoid"}, {}),
    "learn in parts": ("learn", {"max_grad_norm": 1.0}, {"accumulate": 2}),
    "vit averaged": ("vit", {"mixup": 0.4}, {"ema": 0.9}),
}


@no_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_replayed_is_the_step(case, images, recorded):
    """The same bits over three epochs whose last batches are smaller, dropout included."""
    name, options, further = CASES[case]
    plan = TrainPlan(3, 8, 3e-3, **{"max_grad_norm": 1.0, **options})
    ema, parts = further.get("ema", 0.0), further.get("accumulate", 1)
    model = new_model(name, dropout=0.1)
    expected, curve = trained(
        model if name == "vit" else reserving(model),
        images,
        plan,
        ema=ema,
        execution=Execution(accumulate=parts),
    )
    assert not recorded
    with fake_gpu() as record:
        found, ours = trained(
            new_model(name, dropout=0.1),
            images,
            plan,
            ema=ema,
            device=GPU,
            execution=Execution(accumulate=parts, graph=True),
        )
        (graph,) = recorded
        assert (graph.captures, graph.replays) == (1, 6)
    assert ours == curve
    assert found.keys() == expected.keys()
    for each, tensor in found.items():
        assert_same_bits(tensor, expected[each])
