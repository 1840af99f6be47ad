"""What a captured step returns: the harness keeps it for as long as it replays the graph."""

import contextlib
import gc
import weakref
from typing import NamedTuple

import pytest
import torch

from adatape_kernels.benchmarks.harness import timing


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Runs nothing at a replay: the step has left its results in the tensors that it returned."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    for name, stand_in in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("CUDAGraph", Graph),
        ("graph", lambda graph: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)


class Out(NamedTuple):
    logits: torch.Tensor
    note: str


class Square(torch.autograd.Function):
    """Keeps an object in the graph, by which a test sees whether the graph is still there."""

    saved: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.kept = type("Kept", (), {})()
        Square.saved.append(weakref.ref(ctx.kept))
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: logits,
        lambda logits: (logits, logits.detach(), 3),
        lambda logits: Out(logits, "as it is"),
        lambda logits: {"logits": [logits]},
    ],
)
def test_a_captured_step_keeps_no_graph_alive(form):
    x = torch.arange(3.0, requires_grad=True)
    Square.saved.clear()
    replay = timing.captured(lambda: form(Square.apply(x)))
    gc.collect()
    assert len(Square.saved) == 3 and not any(kept() for kept in Square.saved)
    before = Graph.replays
    found = replay()
    assert Graph.replays == before + 1
    logits = found
    while not isinstance(logits, torch.Tensor):
        logits = logits["logits"] if isinstance(logits, dict) else logits[0]
    assert logits.tolist() == [0, 1, 4] and logits.grad_fn is None
    assert type(found) is type(form(logits))
    if isinstance(found, Out):
        assert found.note == "as it is"
