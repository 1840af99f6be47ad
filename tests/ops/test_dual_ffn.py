"""What `dual_ffn` computes."""

import itertools
import math

import literal
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_low_precision, assert_same_bits
from ffn_cases import by_reference, double, gradients, inputs, not_served
from hypothesis import given
from hypothesis import strategies as st

from adatape_kernels.ops import FFN, FFN_PRODUCTS, dual_ffn

OP = "dual_ffn"
pytestmark = [pytest.mark.usefixtures("products"), pytest.mark.absent_if(reason=not_served)]


def assert_matches_literal(x, num_input_rows, input_ffn, tape_ffn, num_rows=None):
    y = dual_ffn(x, num_input_rows, input_ffn, tape_ffn, num_rows=num_rows)
    expected = literal.dual_ffn(
        x.tolist(),
        int(num_input_rows),
        [p.tolist() for p in input_ffn],
        tape_ffn and [p.tolist() for p in tape_ffn],
        len(x) if num_rows is None else int(num_rows),
    )
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_close(y, torch.tensor(expected, dtype=torch.float64).view(x.shape), 1e-5)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("counts", ["ints", "scalars", "int32 scalars"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [(5, 9), (5, None), (0, 9), (9, 9), (0, 0), (11, 11)])
def test_matches_the_literal_loop(device, rows, two, counts):
    """Row counts as ints and as scalars on the device."""
    x, input_ffn, tape_ffn, _ = inputs(11, device=device)
    middle, end = rows
    if counts != "ints":
        dtype = torch.int32 if counts == "int32 scalars" else torch.int64
        middle = torch.tensor(middle, device=device, dtype=dtype)
        end = None if end is None else torch.tensor(end, device=device, dtype=dtype)
    assert_matches_literal(x, middle, input_ffn, tape_ffn if two else None, end)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("on_device", [False, True], ids=["the last", "the first"])
def test_one_count_on_the_device(device, on_device):
    x, input_ffn, tape_ffn, _ = inputs(11, device=device)
    counts = [5, 9]
    counts[not on_device] = torch.tensor(counts[not on_device], device=device)
    assert_matches_literal(x, counts[0], input_ffn, tape_ffn, counts[1])


@pytest.mark.backends("eager", "cpp", "cuda")
@given(rows=st.lists(st.integers(0, 6), min_size=3, max_size=3), two=st.booleans())
def test_any_rows_match_the_literal_loop(device, rows, two):
    assert_rows_match(device, rows, two)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_rows_of_each_kind_or_none_match_the_literal_loop(device, two):
    """The interpreter is slow: here each kind of rows is there or not, and no more."""
    for rows in itertools.product((0, 5), (0, 3), (0, 2)):
        assert_rows_match(device, rows, two)


def assert_rows_match(device, rows, two):
    """Compare a call with input, tape and unused rows with the literal loop, gradients too."""
    num_input_rows, num_rows, total = rows[0], sum(rows[:2]), sum(rows)
    x, input_ffn, tape_ffn, dy = inputs(total, device=device)
    given = x, num_input_rows, input_ffn, tape_ffn if two else None
    assert_matches_literal(*given, num_rows)
    actual = gradients(dual_ffn, *given, dy, num_rows)
    x, dy, *ffns = double(x, dy, *given[2:])
    expected = gradients(by_reference, x, num_input_rows, *ffns, dy, num_rows)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("num_rows", [None, 6, torch.tensor(6)], ids=["all", "int", "scalar"])
def test_gradcheck(device, dtype, two, num_rows):
    x, input_ffn, tape_ffn, _ = inputs(7, device=device, dtype=dtype, dim=3, hidden=4)
    end = num_rows.to(device) if isinstance(num_rows, torch.Tensor) else num_rows

    def run(x, *parameters):
        tape_ffn = FFN(*parameters[4:]) if two else None
        return dual_ffn(x, 4, FFN(*parameters[:4]), tape_ffn, num_rows=end)

    given = [x, *input_ffn, *(tape_ffn if two else ())]
    assert torch.autograd.gradcheck(run, [p.requires_grad_() for p in given])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_backward_is_the_reference_s(device, dtype, two):
    x, input_ffn, tape_ffn, dy = inputs(
        200, device=device, dtype=dtype, dim=48, hidden=96, tape_hidden=33
    )
    tape_ffn = tape_ffn if two else None
    actual = gradients(dual_ffn, x, 170, input_ffn, tape_ffn, dy, 190)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    expected = gradients(by_reference, x, 170, *ffns, dy, 190)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)


def _each_two_once(device, backend, products, dtype, on_device, **parameters):
    """In Triton's interpreter each two of form, dtype and kind of counts meet at every size."""
    slow = device == "cpu" and backend == "triton"
    turn = FFN_PRODUCTS.index(products) + (dtype == torch.float16) + on_device
    return "other cases have each two of these" if slow and turn % 2 else None


@pytest.mark.many_emulated_threads
@pytest.mark.absent_if(reason=_each_two_once)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
@pytest.mark.parametrize(
    "sizes", [(144, 144, 80), (70, 133, 69), (20, 41, 13)], ids=["aligned", "odd", "narrow"]
)
def test_many_tiles(device, sizes, on_device, dtype):
    """Several tiles each way; the gradients of narrow weights are summed in several parts."""
    dim, hidden, tape_hidden = sizes
    x, input_ffn, tape_ffn, dy = inputs(
        300, device=device, dtype=dtype, dim=dim, hidden=hidden, tape_hidden=tape_hidden
    )
    x[270:] = dy[270:] = math.nan
    middle, end = (torch.tensor(n, device=device) if on_device else n for n in (201, 270))
    actual = gradients(dual_ffn, x, middle, input_ffn, tape_ffn, dy, end)
    rounded = gradients(by_reference, x, 201, input_ffn, tape_ffn, dy, 270)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    exact = gradients(by_reference, x, 201, *ffns, dy, 270)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert_low_precision(a, r, e, floor=1e-6 * e.abs().max().item())


def test_strided_inputs_and_gradients(device):
    x, input_ffn, tape_ffn, _ = inputs(9, device=device)
    x = torch.randn(6, 9, device=device).mT
    transposed = [
        FFN(*(p.mT.contiguous().mT if p.dim() == 2 else p for p in parameters))
        for parameters in (input_ffn, tape_ffn)
    ]
    dy = torch.randn(9, 1, device=device).expand(9, 6)
    actual = gradients(dual_ffn, x, 5, *transposed, dy, 8)
    expected = gradients(dual_ffn, x.contiguous(), 5, input_ffn, tape_ffn, dy.contiguous(), 8)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)
        assert a.is_contiguous()
    leaf = x.requires_grad_()
    dual_ffn(leaf, 5, input_ffn, tape_ffn, num_rows=8).sum().backward()
    ones = torch.ones(9, 6, device=device)
    assert_close(leaf.grad, gradients(dual_ffn, x, 5, input_ffn, tape_ffn, ones, 8)[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    x, input_ffn, tape_ffn, dy = inputs(
        64, device=device, dtype=dtype, dim=48, hidden=96, tape_hidden=32
    )
    actual = gradients(dual_ffn, x, 50, input_ffn, tape_ffn, dy)

    def plain(x, middle, a, b, num_rows):
        act = F.gelu(F.linear(x[:middle], a.w1, a.b1), approximate="tanh")
        glu = F.glu(F.linear(x[middle:], b.w1, b.b1))
        return torch.cat([F.linear(act, a.w2, a.b2), F.linear(glu, b.w2, b.b2)])

    rounded = gradients(plain, x, 50, input_ffn, tape_ffn, dy)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    exact = gradients(by_reference, x, 50, *ffns, dy)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == dtype
        assert_low_precision(a, r, e, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_casts_like_a_linear_layer(device, dtype):
    x, input_ffn, tape_ffn, dy = inputs(9, device=device)
    with torch.autocast(device, dtype=dtype):
        y, *grads = gradients(dual_ffn, x, 5, input_ffn, tape_ffn, dy.to(dtype))
    assert y.dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads)
    low = [FFN(*(p.to(dtype) for p in f)) for f in (input_ffn, tape_ffn)]
    expected = gradients(dual_ffn, x.to(dtype), 5, *low, dy.to(dtype))
    for a, e in zip([y, *grads], expected, strict=True):
        assert_same_bits(a.to(dtype), e)


@pytest.mark.parametrize("kind", ["input", "tape"])
def test_poison_stays_in_its_row(device, kind):
    """A poisoned row and unused rows, gradient included; the other kind's parameters stay clean."""
    x, input_ffn, tape_ffn, dy = inputs(12, device=device)
    clean = gradients(dual_ffn, x, 6, input_ffn, tape_ffn, dy, 10)
    row = 2 if kind == "input" else 8
    x, dy = x.clone(), dy.clone()
    x[row] = x[10:] = dy[row] = dy[10:] = math.nan
    for end in (10, torch.tensor(10, device=device)):
        dirty = gradients(dual_ffn, x, 6, input_ffn, tape_ffn, dy, end)
        others = [r for r in range(12) if r != row]
        for n in (0, 1):
            assert_close(dirty[n][others], clean[n][others], 1e-6)
            assert not dirty[n][10:].any() and dirty[n][row].isnan().all()
        for n in range(6, 10) if kind == "input" else range(2, 6):
            assert_close(dirty[n], clean[n], 1e-6)


@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows(device, rows, two):
    """No row at all, and rows that are all unused: zero, and zero gradients."""
    x, input_ffn, tape_ffn, dy = inputs(rows, device=device)
    for end in (0, torch.tensor(0, device=device)):
        for g in gradients(dual_ffn, x, 0, input_ffn, tape_ffn if two else None, dy, end):
            assert not g.any()
