"""Offsets, lengths and indices as int64, which cumsum, topk and argsort give."""

import pytest
import torch
from checks import assert_same_bits, refused

from adatape_kernels.ops import elastic_attention, tape_gather

OP = ("elastic_attention", "tape_gather")
HUGE = 1 << 32  # int32 would hold 0 of it


def attention_inputs(device):
    q = torch.randn(9, 2, 8, device=device, requires_grad=True)
    lens = torch.tensor([[3, 0, 2], [1, 2, 0]], device=device)
    zero = lens.new_zeros(1)
    cu_inputs = torch.cat([zero, lens[0].cumsum(0)])
    cu_tapes = torch.cat([zero, lens[1].cumsum(0)]) + 5
    assert cu_inputs.dtype == cu_tapes.dtype == torch.int64
    return q, cu_inputs, cu_tapes


def gather_inputs(device):
    bank = torch.randn(7, 4, device=device, requires_grad=True)
    weights, indices = torch.rand(2, 3, 7, device=device).topk(2)
    assert indices.dtype == torch.int64
    return bank, indices, weights, torch.tensor([3, 1], device=device)


def with_gradient(run, leaf):
    out = run()
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    return out, grad


@pytest.mark.runs_no_op
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["inputs", "tapes", "both"])
def test_attention(device, which):
    q, *offsets = attention_inputs(device)
    short = [o.int() for o in offsets]
    given = [o if n in which else o.int() for n, o in enumerate(offsets)]
    actual = with_gradient(lambda: elastic_attention(q, q, q, *given), q)
    expected = with_gradient(lambda: elastic_attention(q, q, q, *short), q)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.runs_no_op
@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["indices", "counts", "both"])
def test_gather(device, which, capacity):
    bank, indices, weights, counts = gather_inputs(device)
    long = [v if n in which else v.int() for n, v in enumerate((indices, counts))]

    def run(indices, counts):
        tape, offsets = tape_gather(bank, indices, weights, counts, capacity=capacity)
        assert offsets.dtype == torch.int32 and offsets.tolist() == [0, 3, 4]
        return with_gradient(lambda: tape, bank)

    for a, e in zip(run(*long), run(indices.int(), counts.int()), strict=True):
        assert_same_bits(a, e)


@pytest.mark.runs_no_op
@pytest.mark.absent_if(reason=lambda device, **_: "unseen there" if device == "cuda" else None)
@pytest.mark.parametrize("wrong", [HUGE, HUGE + 5, -HUGE, (1 << 63) - 1])
def test_what_int32_does_not_hold_is_refused(device, wrong):
    """Never taken for what is left of it in 32 bits."""
    q, *offsets = attention_inputs(device)
    for name, place in (("cu_inputs", 0), ("cu_tapes", 1)):
        corrupt = [o.clone() for o in offsets]
        corrupt[place][2] = wrong
        with refused(name, "int32", f"got {wrong}"):
            elastic_attention(q, q, q, *corrupt)
    bank, indices, weights, counts = gather_inputs(device)
    corrupt = indices.clone()
    corrupt[1, 0, 1] = wrong
    with refused("indices", "where read"):
        tape_gather(bank, corrupt, weights, counts)
    with refused("counts", "int32", f"got {wrong}"):
        tape_gather(bank, indices, weights, torch.tensor([wrong, 1], device=device))


@pytest.mark.runs_no_op
def test_indices_that_were_not_read_may_be_anything(device):
    bank, indices, weights, counts = gather_inputs(device)
    tape, _ = tape_gather(bank, indices, weights, counts)
    indices[1, 1], indices[1, 2] = 1 << 62, -1
    assert_same_bits(tape_gather(bank, indices, weights, counts)[0], tape)


@pytest.mark.compiles
@pytest.mark.runs_no_op
def test_compiled(fresh_compiler, device):
    """In one graph; a wrong value is then refused by what looks at the values anyway."""
    q, *offsets = attention_inputs(device)
    attend = torch.compile(elastic_attention, fullgraph=True)
    assert_same_bits(attend(q, q, q, *offsets), elastic_attention(q, q, q, *offsets))
    bank, *given = gather_inputs(device)
    gather = torch.compile(tape_gather, fullgraph=True)
    expected, _ = tape_gather(bank, *given, capacity=6)
    assert_same_bits(gather(bank, *given, capacity=6)[0], expected)


@pytest.mark.no_backend
def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(9, 2, 8)
        offsets = torch.empty(2, 4, dtype=torch.int64).unbind(0)
        assert elastic_attention(q, q, q, *offsets).shape == q.shape
        indices, counts = torch.empty(2, 3, 2, dtype=torch.int64), torch.empty(2).long()
        tape, cu = tape_gather(torch.empty(7, 4), indices, torch.empty(2, 3, 2), counts, capacity=5)
    assert tape.shape == (5, 4) and cu.dtype == torch.int32
