import math

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_low_precision, assert_same_bits, opcheck
from norm_cases import not_served, stream

from adatape_kernels import reference
from adatape_kernels.ops import add_layer_norm, triton_runtime
from adatape_kernels.ops.op import operation

OP = "add_layer_norm"


pytestmark = pytest.mark.absent_if(reason=not_served)


def cotangents(x):
    return [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2)]


def gradients(op, given, dtotal, dnormed, eps=1e-6):
    """The sum, its LayerNorm, and the gradients of x, branch, weight and bias."""
    given = [t.detach().requires_grad_() for t in given]
    outputs = op(*given, eps)[:2]
    grads = torch.autograd.grad(outputs, given, [dtotal, dnormed])
    return [*(o.detach() for o in outputs), *grads]


def double(tensors):
    return [t.double() for t in tensors]


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("dim", [1, 3, 12, 130])
def test_matches_the_literal_loop(device, dim, eps):
    x, branch, weight, bias = given = stream(device, dim=dim)
    total, normed = add_layer_norm(*given, eps)
    sums, expected = [], []
    for row, added in zip(x.tolist(), branch.tolist(), strict=True):
        s = [a + b for a, b in zip(row, added, strict=True)]
        mean = sum(s) / dim
        deviation = math.sqrt(sum((v - mean) ** 2 for v in s) / dim + eps)
        y = [(v - mean) / deviation for v in s]
        sums.append(s)
        expected.append([a * b + c for a, b, c in zip(y, weight.tolist(), bias, strict=True)])
    assert_close(total, sums, 1e-6)
    # At dim 1 a row is its own mean, but for rounding that eps alone holds down.
    assert_close(normed, expected, 1e-5 if dim > 1 else 1e-3)
    assert total.is_contiguous() and normed.is_contiguous()


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("dim", [5, 33, 384, 2100])
def test_backward_is_that_of_torch(device, rows, dim):
    """By torch's own LayerNorm in float64; rows fill one program or several."""
    given = stream(device, rows if dim < 1000 else min(rows, 5), dim)

    def plain(x, branch, weight, bias, eps):
        return x + branch, F.layer_norm(x + branch, (dim,), weight, bias, eps)

    grads = cotangents(given[0])
    expected = gradients(plain, double(given), *double(grads))
    for a, e in zip(gradients(add_layer_norm, given, *grads), expected, strict=True):
        assert_close(a, e, 2e-5)


def test_each_gradient_alone(device):
    given = stream(device)
    dtotal, dnormed = cotangents(given[0])
    zero = torch.zeros_like(dtotal)
    sum_alone = gradients(add_layer_norm, given, dtotal, zero)
    assert_same_bits(sum_alone[2], dtotal)
    assert_same_bits(sum_alone[3], dtotal)
    assert not sum_alone[4].any() and not sum_alone[5].any()
    both = gradients(add_layer_norm, given, dtotal, dnormed)
    norm_alone = gradients(add_layer_norm, given, zero, dnormed)
    assert_close(norm_alone[2] + dtotal, both[2].double(), 1e-6)

    x, branch, weight, bias = (t.requires_grad_() for t in given)
    add_layer_norm(x, branch, weight, bias)[1].sum().backward()
    assert x.grad.shape == x.shape
    assert_close(bias.grad, [7.0] * 12, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype):
    given = [t.requires_grad_() for t in stream(device, rows=3, dim=4, dtype=dtype)]
    assert torch.autograd.gradcheck(lambda *tensors: add_layer_norm(*tensors, 1e-6), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    """The sum is rounded once, and what is normalised is the rounded sum."""
    given = stream(device, rows=64, dim=96, dtype=dtype)
    grads = cotangents(given[0])

    def plain(x, branch, weight, bias, eps):
        total = x + branch
        centred = total - total.mean(1, keepdim=True)
        normed = centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        return total, normed * weight + bias

    actual = gradients(add_layer_norm, given, *grads)
    exact = gradients(plain, double(given), *double(grads))
    rounded = gradients(plain, given, *grads)
    assert_same_bits(actual[0], given[0] + given[1])
    for n in range(6):
        assert actual[n].dtype == dtype
        assert_low_precision(actual[n], rounded[n], exact[n], floor=1e-6)
    of_the_sum = F.layer_norm(actual[0].double(), (96,), *double(given[2:]), 1e-6)
    assert_close(actual[1], of_the_sum, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("dtype", "branch_dtype", "weight_dtype"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_mixed_dtypes(device, dtype, branch_dtype, weight_dtype):
    """As under autocast, where the stream is float32 and its branches are not."""
    x, branch, weight, bias = stream(device)
    dtypes = (dtype, branch_dtype, weight_dtype, weight_dtype)
    given = [t.to(d) for t, d in zip((x, branch, weight, bias), dtypes, strict=True)]
    grads = cotangents(given[0])
    actual = gradients(add_layer_norm, given, *grads)
    expected = gradients(reference.add_layer_norm, double(given), *double(grads))
    for a, e, d in zip(actual, expected, (dtype, dtype, *dtypes), strict=True):
        assert a.dtype == d
        assert_close(a, e, 4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", ["weight", "bias"])
def test_each_parameter_s_gradient_has_the_precision_of_its_own_dtype(device, dtype, wide):
    """One parameter has float32 and the other the dtype of x: the rounding of one is its own."""
    narrow, broad = sorted((dtype, torch.float32), key=lambda d: -torch.finfo(d).eps)
    x, _, *parameters = stream(device, rows=300, dtype=dtype)
    dtypes = (broad, narrow) if wide == "weight" else (narrow, broad)
    parameters = [p.to(d) for p, d in zip(parameters, dtypes, strict=True)]
    given = [x, torch.zeros_like(x), *parameters]
    grads = cotangents(x)
    actual = gradients(add_layer_norm, given, *grads)[-2:]
    expected = gradients(reference.add_layer_norm, double(given), *double(grads))[-2:]
    for a, e, d in zip(actual, expected, dtypes, strict=True):
        assert a.dtype == d
        error = (a.double() - e).norm() / e.norm()
        assert error <= (4 if dtype == torch.float64 else 20) * torch.finfo(d).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_branch_in_double_precision_is_not_rounded_before_the_sum(device, dtype):
    x, branch, weight, bias = stream(device, rows=40, dtype=dtype)
    branch = 1e-3 * torch.randn(40, 12, device=device, dtype=torch.float64) - x.double()
    branch[0], x[0] = -0.0, -0.0
    total, normed = add_layer_norm(x, branch, weight, bias)
    assert_same_bits(total, (x + branch).to(dtype))
    assert_close(
        normed,
        F.layer_norm(total.double(), (12,), weight.double(), bias.double(), 1e-6),
        4 * torch.finfo(dtype).eps,
    )
    strided = torch.stack([branch, branch], 2)[..., 1]
    assert_same_bits(add_layer_norm(x, strided, weight, bias)[1], normed)
    empty = add_layer_norm(x[:0], branch[:0], weight, bias)
    assert [t.shape for t in empty] == [(0, 12), (0, 12)]


def test_strided_inputs_and_gradients(device):
    given = stream(device)
    wide = torch.randn(7, 24, device=device)
    strided = [given[0].mT.contiguous().mT, wide[:, 5:17], *wide[0].view(12, 2).unbind(1)]
    assert not any(t.is_contiguous() for t in strided)
    dtotal, dnormed = wide[:, ::2], torch.tensor(0.5, device=device).expand(7, 12)
    actual = gradients(add_layer_norm, strided, dtotal, dnormed)
    copies = [t.contiguous() for t in (*strided, dtotal, dnormed)]
    for a, e in zip(actual, gradients(add_layer_norm, copies[:4], *copies[4:]), strict=True):
        assert_close(a, e.double(), 1e-6)
        assert a.is_contiguous()


def test_poison_stays_in_its_row(device):
    x, branch, weight, bias = given = stream(device)
    dtotal, dnormed = cotangents(x)
    clean = gradients(add_layer_norm, given, dtotal, dnormed)
    x, branch, dtotal, dnormed = (t.clone() for t in (x, branch, dtotal, dnormed))
    x[1, 3], branch[3, 0], dtotal[5, 2], dnormed[6] = math.nan, math.inf, math.nan, math.nan
    actual = gradients(add_layer_norm, (x, branch, weight, bias), dtotal, dnormed)
    for n, sound in ((0, [0, 2, 4, 5, 6]), (1, [0, 2, 4, 5, 6]), (2, [0, 2, 4]), (3, [0, 2, 4])):
        assert_same_bits(actual[n][sound], clean[n][sound])
    assert actual[1][1].isnan().all() and actual[1][3].isnan().all()
    assert actual[2][5].isnan().sum() == 1


@pytest.mark.parametrize("dim", [1, 12])
def test_no_rows(device, dim):
    given = stream(device, rows=0, dim=dim)
    total, normed, dx, dbranch, dweight, dbias = gradients(
        add_layer_norm, given, *cotangents(given[0])
    )
    assert total.shape == normed.shape == dx.shape == dbranch.shape == (0, dim)
    assert dweight.tolist() == dbias.tolist() == [0.0] * dim


@pytest.mark.parametrize("dim", [4096, 5000])
def test_very_wide_rows(device, dim):
    """As wide as one of Triton's programs holds, and wider."""
    given = stream(device, rows=2, dim=dim)
    grads = cotangents(given[0])
    actual = gradients(add_layer_norm, given, *grads)
    expected = gradients(reference.add_layer_norm, double(given), *double(grads))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


def test_sums_of_many_rows_have_the_same_bits_each_time(device):
    given = stream(device, rows=1100, dim=2)
    grads = cotangents(given[0])
    first, again = (gradients(add_layer_norm, given, *grads) for _ in range(2))
    for a, e in zip(again, first, strict=True):
        assert_same_bits(a, e)


def test_a_row_s_bits_do_not_depend_on_the_others(device):
    given = stream(device, rows=40, dim=48)
    grads = cotangents(given[0])
    together = gradients(add_layer_norm, given, *grads)
    for rows in ([7], [39, 0, 12]):
        x, branch, dtotal, dnormed = (t[rows] for t in (*given[:2], *grads))
        alone = gradients(add_layer_norm, (x, branch, *given[2:]), dtotal, dnormed)
        for a, e in zip(alone[:4], together[:4], strict=True):
            assert_same_bits(a, e[rows])


@pytest.mark.compiles
@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device, requires_grad, rows):
    x, branch, weight, bias = stream(device, rows)
    given = (x.mT.contiguous().mT, branch, weight, bias)
    args = (*(t.requires_grad_(requires_grad) for t in given), 1e-6)
    opcheck(torch.ops.adatape.add_layer_norm.default, args)


@pytest.mark.compiles
def test_opcheck_of_the_backward(device):
    x, branch, weight, bias = stream(device)
    total, _, mean, rstd = torch.ops.adatape.add_layer_norm(x, branch, weight, bias, 1e-6)
    args = (*cotangents(x), total, weight, mean, rstd)
    opcheck(torch.ops.adatape.add_layer_norm_bwd.default, args)


@pytest.mark.compiles
def test_compiles_once_for_all_sizes(fresh_compiler, device):
    compiled = torch.compile(add_layer_norm, fullgraph=True, dynamic=True)
    for n, (rows, dim) in enumerate([(7, 12), (5, 9), (30, 4)]):
        given = stream(device, rows, dim)
        grads = cotangents(given[0])
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, given, *grads)
        for a, e in zip(actual, gradients(add_layer_norm, given, *grads), strict=True):
            assert_close(a, e.double(), 1e-5)


def test_any_width_is_one_launch_each_way():
    for dim in (1, 384, 4096):
        with triton_runtime.recording() as launches, torch.device("meta"):
            given = stream("meta", rows=50, dim=dim)
            forward, backward = (
                operation(op).implementations["triton"].function for op in (OP, f"{OP}_bwd")
            )
            total, normed, mean, rstd = forward(*given, 1e-6)
            backward(total, normed, total, given[2], mean, rstd)
        assert len(launches) == 2
