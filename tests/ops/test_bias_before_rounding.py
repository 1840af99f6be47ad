"""Sums in half precision are rounded once, behind their bias: also where the two cancel."""

import pytest
import torch
from checks import assert_low_precision
from ffn_cases import double, inputs, not_served

from adatape_kernels import reference

OP = "dual_ffn"
SIZES = [dict(dim=48, hidden=96, tape_hidden=32), dict(dim=17, hidden=9, tape_hidden=33)]
pytestmark = [
    pytest.mark.usefixtures("products"),
    pytest.mark.absent_if(reason=not_served),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16]),
    pytest.mark.parametrize("sizes", SIZES, ids=["even", "odd"]),
]


def in_all_ways(x, input_ffn, tape_ffn, activation="relu"):
    """Triples of what the op, the reference and float64 return: results and pre-activations."""
    middle = len(x) * 5 // 8
    parameters = *input_ffn, *tape_ffn
    actual = torch.ops.adatape.dual_ffn(x, middle, len(x) - middle, None, activation, *parameters)
    wide_x, *wide = double(x, input_ffn, tape_ffn)
    plain = reference.dual_ffn(x, middle, input_ffn, tape_ffn, activation=activation)
    exact = reference.dual_ffn(wide_x, middle, *wide, activation=activation)
    return zip(actual, plain, exact, strict=True)


def test_no_error_is_larger_on_average(device, dtype, sizes):
    x, input_ffn, tape_ffn, _ = inputs(320, device=device, dtype=dtype, **sizes)
    for actual, plain, exact in in_all_ways(x, input_ffn, tape_ffn, "gelu_tanh"):
        error, allowed = ((each.double() - exact).abs().mean() for each in (actual, plain))
        assert error <= 1.02 * allowed, (error, allowed)


def test_pre_activations_that_cancel(device, dtype, sizes):
    """The first biases are the negatives of the products, which are alike in all rows."""
    x, *ffns, _ = inputs(40, device=device, dtype=dtype, **sizes)
    x = x[:1].repeat(40, 1)
    ffns = [ffn._replace(b1=-(ffn.w1.double() @ x[0].double()).to(dtype)) for ffn in ffns]
    _, *hiddens = in_all_ways(x, *ffns)
    for actual, plain, exact in hiddens:
        assert_low_precision(actual, plain, exact, floor=1e-6)
        assert (actual.double() - exact).abs().max() <= 1e-5 + 0.01 * exact.abs().max()


def test_results_that_cancel(device, dtype, sizes):
    """The second biases are such negatives; the activations before them are small integers."""
    x, *ffns, _ = inputs(40, device=device, dtype=dtype, **sizes)
    for i, ffn in enumerate(ffns):
        b1 = torch.arange(len(ffn.b1), device=device).remainder(7).to(dtype)
        act = b1
        if i == 1:
            act, gate = b1.chunk(2)
            gate[:] = 30  # the gate is 1
        b2 = -(ffn.w2.double() @ act.double()).to(dtype)
        ffns[i] = ffn._replace(w1=torch.zeros_like(ffn.w1), b1=b1, b2=b2)
    (actual, plain, exact), *_ = in_all_ways(x, *ffns)
    assert_low_precision(actual, plain, exact, floor=1e-6)
    assert (actual.double() - exact).abs().max() <= 1e-5 + 0.01 * exact.abs().max()
