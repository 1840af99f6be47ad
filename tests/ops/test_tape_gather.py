"""What `tape_gather` computes, and what it refuses."""

import math

import literal
import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits
from gather_cases import COUNTS, cotangent, gradients, read
from hypothesis import given
from hypothesis import strategies as st

from adatape_kernels import reference
from adatape_kernels.ops import tape_gather

OP = "tape_gather"


def assert_matches_literal(bank, indices, weights, counts, capacity=None):
    tape, offsets = tape_gather(bank, indices, weights, counts, capacity=capacity)
    banks = [bank] * len(counts) if bank.dim() == 2 else bank
    reads = (x.tolist() for x in (indices, weights, counts))
    rows, ends = literal.tape_gather(*reads, banks=[b.tolist() for b in banks])
    assert offsets.dtype == torch.int32 and offsets.tolist() == ends
    assert tape.dtype == bank.dtype and tape.is_contiguous()
    unused = 0 if capacity is None else capacity - len(rows)
    rows += [[0.0] * bank.shape[-1]] * unused
    expected = torch.tensor(rows, dtype=torch.float64).view(-1, bank.shape[-1])
    assert_close(tape, expected, 1e-6)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("capacity", [None, 8, 13])
@pytest.mark.parametrize("topk", [1, 3, 32])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_matches_the_literal_loop(device, shared, topk, capacity):
    given = read(device, shared=shared, topk=topk, bank_size=40)
    assert_matches_literal(*given, capacity=capacity)


@st.composite
def ragged(draw):
    batch, steps = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    counts = draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    capacity = draw(st.one_of(st.none(), st.integers(sum(counts), sum(counts) + 3)))
    shapes = dict(topk=draw(st.integers(1, 3)), bank_size=draw(st.integers(3, 5)))
    shapes |= dict(dim=draw(st.integers(1, 4)), shared=draw(st.booleans()))
    return dict(counts=counts, steps=steps, **shapes), capacity


@given(case=ragged())
def test_any_counts_match_the_literal_loop(device, case):
    options, capacity = case
    given = read(device, **options)
    assert_matches_literal(*given, capacity=capacity)
    dtape = cotangent(given[0], given[3], capacity)
    actual = gradients(tape_gather, *given, dtape, capacity=capacity)
    wide = [x.double() if x.is_floating_point() else x for x in given]
    expected = gradients(reference.tape_gather, *wide, dtape.double(), capacity=capacity)
    used = torch.arange(options["steps"], device=device) < given[3][:, None]
    assert_close(actual[2], expected[2], 1e-5)
    assert_close(actual[3][used], expected[3][used], 1e-5)
    assert not actual[3][~used].any()


def test_one_entry_of_weight_one_is_copied_exactly(device):
    bank, indices, weights, counts = read(device, topk=1)
    bank[0, 0, 0] = torch.finfo(torch.float32).max
    tape, _ = tape_gather(bank, indices, torch.ones_like(weights), counts)
    rows = [bank[i, indices[i, s, 0]] for i, n in enumerate(COUNTS) for s in range(n)]
    assert_same_bits(tape, torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulates_in_float32(device, dtype):
    """In float16, 60000 + 60000 overflows; in bfloat16, 256 + 1 is 256."""
    big = 60000.0 if dtype == torch.float16 else 256.0
    small = big if dtype == torch.float16 else 1.0
    bank = torch.tensor([[big], [small], [big]], device=device, dtype=dtype)
    indices = torch.tensor([[[0, 1, 2]]], dtype=torch.int32, device=device)
    weights = torch.tensor([[[1.0, 1.0, -1.0]]], device=device)
    tape, _ = tape_gather(bank, indices, weights, indices.new_ones(1))
    assert tape.item() == small


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("capacity", [None, 11])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_gradcheck(device, dtype, shared, capacity):
    bank, indices, weights, counts = read(device, shared=shared, dtype=dtype)
    weights = weights.nan_to_num(0.5).requires_grad_()

    def tape(bank, weights):
        return tape_gather(bank, indices, weights, counts, capacity=capacity)[0]

    assert torch.autograd.gradcheck(tape, (bank.requires_grad_(), weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_backward_is_the_reference_s(device, dtype, shared, capacity):
    """A shared bank gathers gradients of many examples; the bank is strided."""
    counts = [i % 9 for i in range(24)]
    bank, indices, weights, counts = read(
        device, counts=counts, steps=8, topk=5, bank_size=12, dim=96, shared=shared, dtype=dtype
    )
    given = [bank[..., :64], indices, weights, counts]
    dtape = cotangent(given[0], counts, capacity)
    actual = gradients(tape_gather, *given, dtape, capacity=capacity)
    wide = [x.double() if x.is_floating_point() else x for x in (*given, dtape)]
    expected = gradients(reference.tape_gather, *wide, capacity=capacity)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.nan_to_num(0), 1e-12 if dtype == torch.float64 else 1e-5)


def test_strided_inputs_and_gradients(device):
    bank, indices, weights, counts = read(device)
    dtape = torch.tensor(0.5, device=device).expand(8, 5)
    strided = [
        torch.randn(4, 5, 9, device=device).mT,
        indices.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        weights.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        counts.repeat_interleave(2)[::2],
    ]
    assert not any(x.is_contiguous() for x in strided)
    copies = [x.contiguous() for x in (*strided, dtape)]
    for a, e in zip(
        gradients(tape_gather, *strided, dtape), gradients(tape_gather, *copies), strict=True
    ):
        assert_same_bits(a, e)
        assert a.is_contiguous()
    bank, weights = strided[0].requires_grad_(), strided[2].requires_grad_()
    tape_gather(bank, strided[1], weights, strided[3], capacity=9)[0].sum().backward()
    ones = torch.ones(8, 5, device=device)
    *_, dbank, dweights = gradients(tape_gather, *copies[:4], ones)
    assert_same_bits(bank.grad, dbank)
    assert_same_bits(weights.grad, dweights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_low_precision(device, dtype, shared):
    counts = [6] * 16
    given = read(
        device, counts=counts, steps=6, topk=4, bank_size=32, dim=48, shared=shared, dtype=dtype
    )
    dtape = cotangent(given[0], given[3])
    actual = gradients(tape_gather, *given, dtape)
    exact = gradients(
        reference.tape_gather,
        *(x.double() if x.is_floating_point() else x for x in (*given, dtape)),
    )

    def plain(bank, indices, weights, counts, capacity):
        banks = bank.expand(len(counts), *bank.shape[-2:])
        rows = banks[torch.arange(len(counts), device=device)[:, None, None], indices.long()]
        return torch.einsum("bsk,bskd->bsd", weights.to(dtype), rows).flatten(0, 1), None

    rounded = gradients(plain, *given, dtape)
    assert actual[2].dtype == dtype and actual[3].dtype == torch.float32
    for n in (0, 2, 3):
        assert_low_precision(actual[n], rounded[n], exact[n], floor=1e-6)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_entries_read_again_sum_up(device, shared, deterministic):
    """Within one token, by several tokens of an example, and by other examples."""
    given = read(device, counts=[5, 0, 3, 5], steps=5, topk=4, bank_size=7, dim=130, shared=shared)
    bank, indices, _, counts = given
    indices[0, :5] = torch.tensor([[0, 1, 2, 0], [3, 3, 3, 3], [2, 0, 4, 1], [5, 6, 1, 2], [4] * 4])
    indices[3, :5, 0] = 1
    dtape = cotangent(bank, counts, 15)
    dtape[13:] = math.nan
    wide = [x.double() if x.is_floating_point() else x for x in (*given, dtape)]
    expected = gradients(reference.tape_gather, *wide, capacity=15)
    torch.use_deterministic_algorithms(deterministic)
    try:
        actual = gradients(tape_gather, *given, dtape, capacity=15)
    finally:
        torch.use_deterministic_algorithms(True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)


@pytest.mark.parametrize("capacity", [None, 0, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize(
    ("counts", "steps", "dim", "bank_size"),
    [([], 4, 5, 9), ([0, 0], 4, 5, 9), ([0, 0], 0, 5, 9), ([0], 4, 0, 9), ([0, 0], 4, 5, 0)],
    ids=["batch", "counts", "steps", "dim", "bank"],
)
def test_empty(device, counts, steps, dim, bank_size, shared, capacity):
    bank, indices, weights, counts = read(
        device, counts=counts, steps=steps, dim=dim, bank_size=max(bank_size, 3), shared=shared
    )
    bank = bank[..., :bank_size, :].requires_grad_()
    weights.requires_grad_()
    tape, offsets = tape_gather(bank, indices, weights, counts, capacity=capacity)
    assert tape.shape == (capacity or 0, dim) and not tape.any()
    assert offsets.tolist() == [0] * (len(counts) + 1)
    tape.sum().backward()
    assert bank.grad.shape == bank.shape and not bank.grad.any()
    assert weights.grad.shape == weights.shape and not weights.grad.any()
