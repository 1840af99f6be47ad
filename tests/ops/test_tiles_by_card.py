"""Kernels whose tiles differ from card to card give the same results with those of every card."""

import pytest
import torch

from adatape_kernels import use_backend
from adatape_kernels.ops import FFN, accumulate_rows, device_facts, dual_ffn, tape_select
from adatape_kernels.ops.device_facts import KIB, DeviceFacts
from adatape_kernels.ops.tape_select.triton_tiled_bank import tiled_bank_config
from adatape_kernels.ops.triton_runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU has the tiles of its own card")

CARDS = {(8, 0): 163, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Compute capabilities, and the KiB of shared memory of a block."""


@pytest.fixture(params=CARDS, ids=lambda capability: "sm_{}{}".format(*capability))
def card(request, monkeypatch):
    """Play a card for the launchers."""
    facts = DeviceFacts("emulated", CARDS[request.param] * KIB, 4, request.param)
    monkeypatch.setattr(device_facts, "EMULATED", facts)
    device_facts.facts_of.cache_clear()
    yield request.param
    device_facts.facts_of.cache_clear()


def on(backend, call):
    with use_backend(backend):
        return call()


def test_a_shared_bank_in_float16(card):
    query, keys = torch.randn(3, 40).half(), torch.randn(150, 40).half()
    options = dict(num_tape_tokens=3, topk=2, halt_threshold=9.0)
    ours, eager = (on(b, lambda: tape_select(query, keys, **options)) for b in ("triton", "eager"))
    assert torch.equal(ours.indices, eager.indices)
    torch.testing.assert_close(ours.weights, eager.weights, atol=2e-3, rtol=0)
    config = tiled_bank_config(torch.float16, keys.shape, 2, card)
    assert config["BLOCK_K"] == (16 if card in ((8, 0), (10, 0)) else 32)


@pytest.mark.parametrize("dim", [6, 16])
def test_feed_forwards_in_float32(card, dim):
    x = torch.randn(70, dim, requires_grad=True)
    ffn = FFN(*(torch.randn(s, requires_grad=True) for s in ((18, dim), (18,), (dim, 18), (dim,))))

    def values_and_gradients():
        y = dual_ffn(x, 70, ffn)
        return y, *torch.autograd.grad(y.square().sum(), (x, *ffn))

    for ours, eager in zip(
        *(on(b, values_and_gradients) for b in ("triton", "eager")), strict=True
    ):
        torch.testing.assert_close(ours, eager, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("of_total", [torch.float16, torch.float32])
def test_rows_that_come_home(card, of_total):
    total, rows = torch.randn(9, 24).to(of_total), torch.randn(4, 24).half()
    source, weights = torch.tensor([1, 3, 4, 8], dtype=torch.int32), torch.rand(4)
    backends = "triton", "eager"
    sums = [on(b, lambda: accumulate_rows(total, rows, source, weights)) for b in backends]
    torch.testing.assert_close(*sums, atol=2e-3, rtol=1e-3)
