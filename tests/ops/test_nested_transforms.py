"""Transforms of torch.func inside of one another, in every order, on the op with gates."""

import itertools

import pytest
import torch
from checks import assert_close
from torch.func import jacfwd, jacrev

import adatape_kernels as ak
from adatape_kernels.ops import FFN
from adatape_kernels.ops.fast_autograd import SINGLE_LEVEL

pytestmark = pytest.mark.skipif(not SINGLE_LEVEL, reason="torch.func is refused on this torch")

DIM, HIDDEN = 4, 3


def ffn(outputs, dtype):
    shapes = (outputs, DIM), (outputs,), (DIM, HIDDEN), (DIM,)
    return FFN(*(torch.randn(shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "order", list(itertools.product((jacfwd, jacrev), repeat=2)), ids=lambda o: o.__name__
)
def test_second_derivatives_are_those_of_formulas(order, dtype, activation):
    inputs, tapes = ffn(HIDDEN, dtype), ffn(2 * HIDDEN, dtype)
    x = torch.randn(5, DIM, dtype=dtype)
    act = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    }[activation]

    def by_op(x):
        return ak.ops.dual_ffn(x, 3, inputs, tapes, activation=activation).pow(3).sum()

    def by_formula(x):
        a, g = (x[3:] @ tapes.w1.T + tapes.b1).chunk(2, 1)
        y = act(x[:3] @ inputs.w1.T + inputs.b1) @ inputs.w2.T + inputs.b2
        return y.pow(3).sum() + ((a * g.sigmoid()) @ tapes.w2.T + tapes.b2).pow(3).sum()

    outer, inner = order
    expected = torch.autograd.functional.hessian(by_formula, x)
    assert_close(outer(inner(by_op))(x), expected, 1e-10 if dtype == torch.float64 else 1e-4)


def test_a_third_derivative_forward_over_two_reverse_ones():
    inputs, tapes = ffn(HIDDEN, torch.float64), ffn(2 * HIDDEN, torch.float64)
    x = torch.randn(2, DIM, dtype=torch.float64)

    def value(x):
        return ak.ops.dual_ffn(x, 1, inputs, tapes).pow(3).sum()

    assert_close(jacfwd(jacrev(jacrev(value)))(x), jacrev(jacrev(jacrev(value)))(x), 1e-10)
