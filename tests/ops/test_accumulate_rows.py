"""What `accumulate_rows` and `accumulate_rows_` add up, what they refuse, and what they promise."""

import math

import literal
import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits, has_one_thread, opcheck
from row_cases import addends, gradients, is_float, widened

from adatape_kernels import reference
from adatape_kernels.ops import accumulate_rows, accumulate_rows_
from adatape_kernels.ops.op import current_backend, operation

OP = ("accumulate_rows", "accumulate_rows_")
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["one weight", "two weights"])


def summed(total, rows, source, weights, total_weights):
    return accumulate_rows(total, rows, source, weights, total_weights=total_weights)


def summed_in_place(total, rows, source, weights, total_weights):
    total = total.detach().clone()
    result = accumulate_rows_(
        total, rows.detach(), source, weights.detach(), total_weights=total_weights
    )
    assert result is total
    return total


def of_reference(total, rows, source, weights, total_weights):
    return reference.accumulate_rows(total, rows, source, weights, total_weights=total_weights)


@pytest.mark.few_emulated_threads
@WEIGHTED
@pytest.mark.parametrize(
    ("num_total", "num_rows", "dim"), [(17, 11, 9), (40, 40, 8), (3, 20, 1), (9, 5, 300)]
)
def test_matches_the_literal_loop(device, num_total, num_rows, dim, weighted):
    given = addends(device, num_total=num_total, num_rows=num_rows, dim=dim, weighted=weighted)
    expected = literal.accumulate_rows(*(x if x is None else x.tolist() for x in given))
    summed_in_place(*given)
    for add in (summed, summed_in_place):
        actual = add(*given)
        assert_close(actual, torch.tensor(expected, dtype=torch.float64), 1e-6)
        assert actual.is_contiguous() and actual.dtype == given[0].dtype
    untouched = [r for r in range(num_total) if r not in given[2].tolist()]
    assert_same_bits(summed(*given)[untouched], given[0][untouched])


@WEIGHTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 300])
def test_gradients_are_the_reference_s(device, dim, weighted, dtype):
    given = addends(device, dim=dim, dtype=dtype, weighted=weighted)
    dsum = torch.randn(17, dim, device=device, dtype=dtype)
    summed_in_place(*given)
    actual = gradients(summed, given, dsum)
    expected = gradients(of_reference, widened(given), dsum.double())
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)
    left_out = given[2] < 0
    assert not any(grad[left_out].any() for grad in actual[2:])


@WEIGHTED
@pytest.mark.parametrize("wide_total", [False, True], ids=["total like rows", "wide total"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(device, dtype, wide_total, weighted):
    given = addends(device, dim=48, dtype=dtype, wide_total=wide_total, weighted=weighted)
    dsum = torch.randn(17, 48, device=device).to(given[0].dtype)
    exact = gradients(of_reference, widened(given), dsum.double())
    rounded = gradients(of_reference, given, dsum)
    actual = gradients(summed, given, dsum)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == r.dtype
        assert_low_precision(a, r, e, floor=1e-6)
    assert_same_bits(summed_in_place(*given), actual[0])


@WEIGHTED
@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype, weighted):
    given = addends(device, dim=3, dtype=dtype, weighted=weighted)
    given = [x.nan_to_num(0.5).requires_grad_() if is_float(x) else x for x in given]
    summed_in_place(*(x.detach() if is_float(x) else x for x in given))
    assert torch.autograd.gradcheck(summed, given)
    assert torch.autograd.gradgradcheck(summed, given)


@pytest.mark.few_emulated_threads
@WEIGHTED
def test_strides_do_not_show(device, weighted):
    total, rows, source, weights, total_weights = addends(device, weighted=weighted)
    expected = summed(total, rows, source, weights, total_weights)
    dsum = torch.randn(9, 17, device=device).mT
    grads = gradients(summed, (total, rows, source, weights, total_weights), dsum.contiguous())

    def apart(x):
        return x if x is None else x.repeat_interleave(2, -1)[..., ::2]

    for change in (apart, lambda x: x.mT.contiguous().mT if x is not None and x.dim() > 1 else x):
        given = [change(x) for x in (total, rows, source, weights, total_weights)]
        for a, e in zip(gradients(summed, given, dsum), grads, strict=True):
            assert_same_bits(a, e)
        in_place = change(total.clone())
        accumulate_rows_(in_place, *given[1:4], total_weights=given[4])
        assert_same_bits(in_place.contiguous(), expected)


@WEIGHTED
def test_a_weight_of_zero_hides_nothing_and_minus_one_does(device, weighted):
    total, rows, source, weights, total_weights = addends(device, weighted=weighted)
    added = (source >= 0).nonzero().flatten()
    rows[added[0]], weights[added[0]] = math.inf, 0.0
    for add in (summed, summed_in_place):
        actual = add(total, rows, source, weights, total_weights)
        assert actual[source[added[0]]].isnan().all()
        others = [r for r in range(len(total)) if r != source[added[0]]]
        assert actual[others].isfinite().all()


@WEIGHTED
def test_bits_do_not_depend_on_the_other_rows(device, weighted):
    """Alone and among others, forward and backward."""
    total, rows, source, weights, total_weights = addends(device, dim=130, weighted=weighted)
    dsum = torch.randn_like(total)
    whole = gradients(summed, (total, rows, source, weights, total_weights), dsum)
    for r in (source >= 0).nonzero().flatten().tolist():
        place = source[r : r + 1].long()
        factor = None if total_weights is None else total_weights[r : r + 1]
        alone = (total[place], rows[r : r + 1], torch.zeros_like(source[:1]), weights[r : r + 1])
        found = gradients(summed, (*alone, factor), dsum[place])
        assert_same_bits(found[0], whole[0][place])
        assert_same_bits(found[1], whole[1][place])
        for a, e in zip(found[2:], whole[2:], strict=True):
            assert_same_bits(a, e[r : r + 1])
    summed_in_place(total, rows, source, weights, total_weights)


@pytest.mark.several_threads
@pytest.mark.absent_if(reason=has_one_thread)
@WEIGHTED
def test_bits_do_not_depend_on_the_number_of_threads(device, weighted):
    given = addends(device, num_total=300, num_rows=200, dim=64, weighted=weighted)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append([summed_in_place(*given), *gradients(summed, given, given[0])])
    torch.set_num_threads(1)
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


@WEIGHTED
@pytest.mark.parametrize(
    ("num_total", "num_rows", "dim"), [(0, 0, 5), (0, 3, 5), (4, 0, 5), (4, 3, 0)]
)
def test_empty(device, num_total, num_rows, dim, weighted):
    given = addends(device, num_total=num_total, num_rows=num_rows, dim=dim, weighted=weighted)
    dsum = torch.randn(num_total, dim, device=device)
    actual = gradients(summed, given, dsum)
    assert actual[0].shape == given[0].shape
    if num_rows == 0 or num_total == 0:
        assert_same_bits(actual[0], given[0])
    assert [x.shape for x in actual[1:]] == [x.shape for x in given if is_float(x)]
    assert_same_bits(summed_in_place(*given), actual[0])


def test_in_place_tells_autograd(device):
    """What was saved of the total for a backward pass is no longer what it was."""
    total, rows, source, weights, _ = addends(device, weighted=False)
    leaf = torch.ones((), device=device, requires_grad=True)
    product = leaf * total
    accumulate_rows(total, rows, source, weights)
    accumulate_rows_(total, rows, source, weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.backends("triton", "cuda")
@pytest.mark.runs_no_op
@WEIGHTED
def test_where_no_value_is_looked_at_none_does_harm(device, weighted):
    """Below the dispatcher: a source outside leaves its row out, and one twice is a row's own."""
    forward, in_place, backward = (
        operation(op).implementations[current_backend()].function
        for op in (*OP, "accumulate_rows_bwd")
    )
    total, rows, source, weights, total_weights = addends(device, weighted=weighted)
    corrupt = source.clone()
    corrupt[source < 0] = torch.tensor([17, -5, 2**31 - 1], dtype=torch.int32).repeat(9)[
        : int((source < 0).sum())
    ]
    sound = (total, rows, source, weights, total_weights)
    given = (total, rows, corrupt, weights, total_weights)
    assert_same_bits(forward(*given), forward(*sound))
    written = total.clone()
    in_place(written, *given[1:])
    assert_same_bits(written, forward(*sound))
    before = total if weighted else None
    for a, e in zip(
        backward(total, before, *given[1:]), backward(total, before, *sound[1:]), strict=True
    ):
        assert_same_bits(a, e)
    twice = torch.full_like(source, 4)
    others = [r for r in range(17) if r != 4]
    assert_same_bits(forward(total, rows, twice, *given[3:])[others], total[others])


@pytest.mark.compiles
@WEIGHTED
@pytest.mark.parametrize("num_rows", [0, 6])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device, requires_grad, num_rows, weighted):
    given = addends(device, num_rows=num_rows, weighted=weighted)
    given = [x.nan_to_num(0).requires_grad_(requires_grad) if is_float(x) else x for x in given]
    opcheck(torch.ops.adatape.accumulate_rows.default, tuple(given))
    if not requires_grad:
        opcheck(torch.ops.adatape.accumulate_rows_.default, tuple(given))
        before = given[0] if weighted else None
        args = (torch.randn_like(given[0]), before, *given[1:])
        opcheck(torch.ops.adatape.accumulate_rows_bwd.default, args)


@pytest.mark.compiles
@WEIGHTED
def test_compiles_once_for_all_sizes(fresh_compiler, device, weighted):
    compiled = torch.compile(summed, fullgraph=True, dynamic=True)

    def written(total, *rest):
        total = total + 1
        accumulate_rows_(total, *rest[:3], total_weights=rest[3])
        return total

    compiled_in_place = torch.compile(written, fullgraph=True, dynamic=True)
    for n, (num_total, num_rows) in enumerate([(17, 11), (9, 4), (20, 30)]):
        given = addends(
            device, num_total=num_total, num_rows=num_rows, dim=4 + n, weighted=weighted
        )
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, given, given[0])
            in_place = compiled_in_place(*given)
        for a, e in zip(actual, gradients(summed, given, given[0]), strict=True):
            assert_same_bits(a, e)
        assert_same_bits(in_place, written(*given))


@WEIGHTED
def test_vmap(device, weighted):
    given = [addends(device, weighted=weighted) for _ in range(3)]
    stacked = [
        torch.stack(parts) if weighted or n < 4 else None
        for n, parts in enumerate(zip(*given, strict=True))
    ]
    dims = tuple(None if x is None else 0 for x in stacked)
    sums = torch.vmap(summed, in_dims=dims)(*stacked)
    written = stacked[0].clone()
    add = lambda *a: accumulate_rows_(*a[:4], total_weights=a[4])  # noqa: E731
    torch.vmap(add, in_dims=dims)(written, *stacked[1:])
    for i, args in enumerate(given):
        assert_same_bits(sums[i], summed(*args))
        assert_same_bits(written[i], summed(*args))
    with pytest.raises(NotImplementedError, match="what it writes into"):
        torch.vmap(add, in_dims=(None, *dims[1:]))(written[0], *stacked[1:])
