"""Transforms of torch.func inside of one another, in every order, on the op with gates."""

import functools
import itertools

import pytest
import torch
from checks import assert_close
from torch.func import jacfwd, jacrev

import adatape_kernels as ak
from adatape_kernels.ops import FFN
from adatape_kernels.ops.fast_autograd import SINGLE_LEVEL

pytestmark = pytest.mark.skipif(not SINGLE_LEVEL, reason="torch.func is refused on this torch")

DIM, HIDDEN = 3, 2


def ffn(outputs, dtype):
    shapes = (outputs, DIM), (outputs,), (DIM, HIDDEN), (DIM,)
    return FFN(*(torch.randn(shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "order", list(itertools.product((jacfwd, jacrev), repeat=2)), ids=["ff", "fr", "rf", "rr"]
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


FFNS = ffn(HIDDEN, torch.float64), ffn(2 * HIDDEN, torch.float64)


def feeding(x):
    return ak.ops.dual_ffn(x, 1, *FFNS)


def attending(x):
    rows, cu_inputs = x.unsqueeze(1), torch.tensor([0, 2])
    return ak.ops.elastic_attention(rows, rows.sin(), rows, cu_inputs, torch.tensor([2, 2]))


def norming(x):
    weight = torch.linspace(1, 2, DIM, dtype=x.dtype)
    return ak.ops.add_layer_norm(x, x.sin(), weight, weight, 1e-3)[1]


def gathering(x):
    indices = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32)
    weights = x[:, :2].unsqueeze(0).softmax(2)
    return ak.ops.tape_gather(x, indices, weights, torch.tensor([2]), capacity=2)[0]


def selecting(x):
    options = {"num_tape_tokens": 2, "topk": 2, "halt_threshold": 9.0}
    read = ak.ops.tape_select(x[:1], torch.cat([x, 2 * x]), **options)
    return torch.cat([read.weights.flatten(), read.ponder]).unsqueeze(0)


def cubed(function, x):
    return function(x).pow(3).sum()


@functools.cache
def third_by_autograd(function):
    """Return a point, and the third derivatives of `cubed` there, one after another."""
    leaf = torch.randn(2, DIM, dtype=torch.float64).requires_grad_()
    rows = []
    (first,) = torch.autograd.grad(cubed(function, leaf), leaf, create_graph=True)
    for slope in first.flatten():
        (second,) = torch.autograd.grad(slope, leaf, create_graph=True)
        for bend in second.flatten():
            rows.append(torch.autograd.grad(bend, leaf, retain_graph=True)[0])
    return leaf.detach(), torch.stack(rows).view(*leaf.shape * 3)


THIRD = [order for order in itertools.product("fr", repeat=3) if order != ("f", "r", "r")]


@pytest.mark.parametrize("function", [feeding, attending, norming, gathering, selecting])
@pytest.mark.parametrize("order", ["".join(order) for order in THIRD if "f" in order])
def test_third_derivatives_are_those_of_autograd(order, function):
    """What the forward op kept depends on its arguments still, in any order of the transforms."""
    found = functools.partial(cubed, function)
    for letter in reversed(order):
        found = {"f": jacfwd, "r": jacrev}[letter](found)
    x, expected = third_by_autograd(function)
    assert_close(found(x), expected, 1e-9)


def test_forward_mode_around_two_reverse_passes_is_refused_in_a_sentence():
    x = torch.randn(2, DIM, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="expected forward mode inside of reverse mode"):
        jacfwd(jacrev(jacrev(lambda x: norming(x).pow(3).sum())))(x)
