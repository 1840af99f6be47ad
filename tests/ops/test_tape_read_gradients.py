"""The gradient of `tape_read`: one op writes the gradient of a bank that was read for two ends."""

import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits, opcheck

from adatape_kernels import reference
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import tape_read
from adatape_kernels.ops.op import current_backend, operation

OP = ("tape_select", "tape_gather", "tape_read")
BANKS = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
STEPS, TOPK = 3, 2


def call(device, dtype, shared, dim=48, key_dim=16, *, batch=5, bank_size=11, loss_type="entropy"):
    """What the op takes: reads of distinct entries, anything at all where nothing was read."""
    wide = wide_dtype(dtype)
    query, dponder = torch.randn(batch, key_dim, device=device), torch.randn(batch, device=device)
    bank = torch.randn(*([] if shared else [batch]), bank_size, dim, device=device)
    order = torch.rand(batch, bank_size, device=device).argsort(-1)
    indices = order[:, : STEPS * TOPK].int().view(batch, STEPS, TOPK)
    counts = (torch.arange(batch, device=device) % (STEPS + 1)).int()
    dweights, weights = torch.randn(2, batch, STEPS, TOPK, device=device).to(wide).unbind(0)
    unused = torch.arange(STEPS, device=device) >= counts[:, None]
    indices[unused], weights[unused], dweights[unused] = 2**31 - 1, torch.nan, torch.nan
    dtape = torch.randn(int(counts.sum()) + 2, dim, device=device)
    dtape[-2:] = torch.nan  # rows that nobody has read
    given = (query.to(dtype), bank.to(dtype), dtape.to(dtype), dweights, dponder.to(wide))
    return [*given, weights, indices, counts, True, loss_type]


def in_double(args):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def by_the_two_gradients(args):
    """The gradients of `tape_gather` and of `tape_select`, added up."""
    query, bank, dtape, dweights, dponder, weights, indices, counts, *options = args
    dbank, dmerging = reference.tape_gather_bwd(dtape, bank, indices, weights, counts)
    keys = bank[..., : query.shape[1]]
    dquery, dkeys = reference.tape_select_bwd(
        query, keys, dweights + dmerging, dponder, indices, counts, *options
    )
    dbank[..., : query.shape[1]] += dkeys
    return dquery, dbank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize(("dim", "key_dim"), [(48, 16), (48, 48), (300, 8), (16, 5), (7, 3)])
@BANKS
def test_is_the_sum_of_both_gradients(device, dtype, shared, dim, key_dim, loss_type):
    args = call(device, dtype, shared, dim, key_dim, loss_type=loss_type)
    actual = torch.ops.adatape.tape_read_bwd(*args)
    expected = by_the_two_gradients(in_double(args))
    if dtype in (torch.float64, torch.float32):
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)
        return
    eager = reference.tape_read_bwd(*args)
    for a, e, exact in zip(actual, eager, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous()
        assert_low_precision(a, e, exact, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BANKS
def test_strides_and_addresses_do_not_matter(device, dtype, shared):
    args = call(device, dtype, shared)
    expected = torch.ops.adatape.tape_read_bwd(*args)

    def elsewhere(x):
        if not torch.is_tensor(x):
            return x
        wider = x.new_empty(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wider[..., 1::2] = x
        return wider[..., 1::2]

    for a, e in zip(torch.ops.adatape.tape_read_bwd(*map(elsewhere, args)), expected, strict=True):
        assert_same_bits(a, e)


@BANKS
@pytest.mark.parametrize("empty", ["batch", "tokens", "counts"])
def test_nothing_was_read(device, shared, empty):
    args = call(device, torch.float32, shared)
    if empty == "batch":
        args = [x[:0] if torch.is_tensor(x) and x is not args[1] else x for x in args]
        args[1] = args[1] if shared else args[1][:0]
    elif empty == "tokens":
        for place in (3, 5, 6):
            args[place] = args[place][:, :0]
        args[7] = torch.zeros_like(args[7])
    else:
        args[7] = torch.zeros_like(args[7])
    dquery, dbank = torch.ops.adatape.tape_read_bwd(*args)
    assert dquery.shape == args[0].shape and dbank.shape == args[1].shape
    assert not dquery.any() and not dbank.any()


@pytest.mark.backends("triton", "cuda")
@pytest.mark.runs_no_op
@BANKS
def test_rows_beyond_the_tape_s_end_have_no_gradient(device, shared):
    """What was read for them still has the gradient that weights and ponder bring."""
    args = call(device, torch.float32, shared)
    rows = int(args[7].sum())
    whole = args[2][:rows].clone()
    whole[rows - 2 :] = 0
    short = [*args[:2], args[2][: rows - 2], *args[3:]]
    function = operation("tape_read_bwd").implementations[current_backend()].function
    expected = by_the_two_gradients(in_double([*args[:2], whole, *args[3:]]))
    for a, e in zip(function(*short), expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_popular_entry(device, dtype):
    """Every example reads the same entries, so that their segments are added up in parts."""
    args = call(device, dtype, True, 40, 8, batch=48)
    args[6][:] = torch.arange(STEPS * TOPK, dtype=torch.int32, device=device).view(STEPS, TOPK)
    args[6][21:, 0, 0] = 8
    first, again = (torch.ops.adatape.tape_read_bwd(*args) for _ in range(2))
    expected = by_the_two_gradients(in_double(args))
    eager = reference.tape_read_bwd(*args)
    for a, b, e, exact in zip(first, again, eager, expected, strict=True):
        assert_same_bits(a, b)
        if dtype == torch.float32:
            assert_close(a, exact, 1e-5)
        else:
            assert_low_precision(a, e, exact, floor=1e-6)


@pytest.mark.compiles
@BANKS
def test_opcheck_of_the_backward(device, shared):
    args = call(device, torch.float32, shared)
    args[2], args[3] = args[2].nan_to_num(), args[3].nan_to_num()
    opcheck(torch.ops.adatape.tape_read_bwd.default, args)


@pytest.mark.parametrize("dtype", [torch.float64])
@BANKS
def test_second_derivative(device, dtype, shared):
    query = torch.randn(2, 3, dtype=dtype, device=device, requires_grad=True)
    bank = torch.randn(*([] if shared else [2]), 6, 4, dtype=dtype, device=device)

    def read(query, bank):
        options = dict(num_tape_tokens=2, topk=2, halt_threshold=1.4)
        tape, _, selection = tape_read(query, bank, **options)
        return tape, selection.weights, selection.ponder

    assert torch.autograd.gradgradcheck(read, (query, bank.requires_grad_()))
