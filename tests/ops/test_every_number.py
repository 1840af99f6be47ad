"""The activations of `dual_ffn` at every exponent: values, slopes and limits, against float64."""

import math

import emulation
import pytest
import torch
from checks import interpreted
from ffn_cases import not_served, other_form_has_it

from adatape_kernels.op_types import ACTIVATIONS
from adatape_kernels.ops import FFN, FFN_PRODUCTS, dual_ffn

OP = "dual_ffn"
HALVES = [torch.bfloat16, torch.float16]
pytestmark = [pytest.mark.usefixtures("products"), pytest.mark.absent_if(reason=not_served)]
BITS = {  # dtype: (an integer of its size, the bits of its mantissa)
    torch.float32: (torch.int32, 23),
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
}


def numbers(dtype, device):
    """Every exponent with both signs and a few mantissas; of two bytes all numbers there are.

    Where kernels for a GPU run on the host, which is slow, two bytes have two mantissas, as four
    bytes have there.
    """
    integer, mantissa_bits = BITS[dtype]
    if integer == torch.int16 and not interpreted(device):
        return torch.arange(-(1 << 15), 1 << 15, dtype=integer).view(dtype)
    exponents = torch.arange(1 << dtype.itemsize * 8 - 1 - mantissa_bits)
    last = (1 << mantissa_bits) - 1
    mantissas = torch.tensor([0, last] if interpreted(device) else [0, 1, last // 2, last])
    size = (exponents.unsqueeze(1) << mantissa_bits | mantissas).flatten()
    lowest = torch.iinfo(integer).min
    return torch.cat([size, size + lowest]).to(integer).view(dtype)


def sigmoid(x):
    return torch.where(x < 0, x.exp(), 1) / (1 + torch.exp(-x.abs()))


def gelu(x):
    """The exact form with its limits, and its slope, in float64."""
    inner = x.clamp(-40, 40)
    density = torch.exp(-inner.square() / 2) / math.sqrt(2 * math.pi)
    tail = torch.special.erfc(inner.abs() / math.sqrt(2)) / 2
    below = torch.where(inner < 0, tail, 1 - tail)
    return torch.where(x > 40, x, inner * below), below + inner * density


def gelu_tanh(x):
    """The tanh form with its limits, and its slope, in float64."""
    inner, root = x.clamp(-40, 40), math.sqrt(2 / math.pi)
    u = root * (inner + 0.044715 * inner**3)
    gate = sigmoid(2 * u)
    slope = gate + 2 * inner * gate * sigmoid(-2 * u) * root * (1 + 3 * 0.044715 * inner.square())
    return torch.where(x > 40, x, inner * gate), slope


def relu(x):
    """NaN stays NaN, and has the slope 1, as in torch."""
    return torch.where(x <= 0, 0, x), torch.where(x <= 0, 0, 1.0).double()


EXACT = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


def assert_exact(actual, expected, dtype, size=1.0):
    """Right to a few units in the last place of the dtype, relative to `size` or to the result."""
    info = torch.finfo(dtype)
    actual, expected = actual.double().cpu(), expected.cpu().to(dtype).double()
    finite = expected.isfinite() & actual.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    close = (actual - expected).abs() <= (2 * info.eps + 1e-6) * (size + expected.abs())
    wrong = ~(same | (finite & close))
    assert not wrong.any(), (actual[wrong][:5], expected[wrong][:5], wrong.nonzero()[:5])


def fed(x, w1, b1, activation="gelu_tanh", tape=False):
    """The result of a feed-forward whose second product is by 1, and gradients of x and of b1."""
    one, zero = x.new_ones(1, 1), x.new_zeros(1)
    x, b1 = x.clone().requires_grad_(), b1.clone().requires_grad_()
    unused = FFN(x.new_ones(1, x.shape[1]), zero, x.new_ones(x.shape[1], 1), zero.expand(1))
    ffn = FFN(w1, b1, one, zero)
    if tape:
        y = dual_ffn(x, 0, unused, ffn)
    else:
        y = dual_ffn(x, len(x), ffn, activation=activation)
    return y.detach(), *torch.autograd.grad(y, [x, b1], torch.ones_like(y))


@pytest.mark.absent_if(reason=other_form_has_it)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, dtype, activation):
    """Values and slopes are right at every number, and infinities and NaN have their limits."""
    x = numbers(dtype, device).to(device)
    if activation == "relu":  # its slope jumps where a product by 1 may round to 0
        x = x[~(x.abs() < torch.finfo(dtype).smallest_normal)]
    y, dx, _ = fed(x.unsqueeze(1), x.new_ones(1, 1), x.new_zeros(1), activation)
    value, slope = EXACT[activation](x.double())
    assert_exact(y.flatten(), value, dtype)
    assert_exact(dx.flatten(), slope, dtype)
    far = x.abs() > 30  # here both are the limits, without an error
    assert torch.equal(dx.flatten()[far], (x[far] > 0).to(dtype))
    assert torch.equal(y.flatten()[far], x[far].clamp(min=0))


GATES = [-math.inf, -1e30, -200, -103, -90, -88, -30, -1.5, 0, 2, 30, 90, 200, 1e30, math.inf]
# Of each kind one, for halves in an interpreter: gates are float32 whatever the dtype.
FEW_GATES = [-math.inf, -103, -30, 0, 2, 200, math.inf]


@pytest.mark.absent_if(reason=other_form_has_it)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [1.0, -3.0, "largest"])
def test_gates(device, dtype, size):
    """A GLU's gate at every number: a · sigmoid(g), and both slopes.

    What is promised is relative to the result, however small: a few units in the last place.
    """
    g = numbers(dtype, device).to(device)
    g = g[g.isfinite()]  # a product with the zero in w1 would spread the others
    a = torch.finfo(dtype).max / 2 if size == "largest" else size
    w1, b1 = g.new_tensor([[0.0], [1.0]]), g.new_tensor([a, 0.0])
    y, dg, _ = fed(g.unsqueeze(1), w1, b1, tape=True)
    exact, a = g.double(), b1[0].item()
    smallest = torch.finfo(torch.float32).smallest_normal  # below it a product by 1 may round to 0
    assert_exact(y.flatten(), a * sigmoid(exact), dtype, size=abs(a) * smallest + 1e-30)
    slope = a * sigmoid(exact) * sigmoid(-exact)
    assert_exact(dg.flatten(), slope, dtype, size=abs(a) * smallest + 1e-30)


def _not_emulated(device, products, **parameters):
    if device == "cuda":
        return "a GPU has its own exponential"
    return None if products == FFN_PRODUCTS[0] else "both forms have the same activations"


@pytest.mark.backends("triton")
@pytest.mark.absent_if(reason=_not_emulated)
@pytest.mark.parametrize("units", [-2, 2])
def test_gates_with_the_exponential_of_a_gpu(device, units, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_exp", emulation.exponential_of_a_gpu(units))
    test_gates(device, torch.float32, "largest")


@pytest.mark.absent_if(reason=other_form_has_it)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("a", [math.inf, -math.inf, math.nan, 1e38, 65504.0, -2.0, 0.0])
def test_infinite_gates(device, dtype, a):
    """Every kind of number meets gates of every kind, and the gradients of both are right."""
    a = torch.tensor(a, dtype=dtype)
    few = interpreted(device) and dtype != torch.float32
    for g in [*(FEW_GATES if few else GATES), math.nan]:
        g = torch.tensor(g, dtype=dtype)
        zeros = torch.zeros(2, 1, device=device, dtype=dtype)
        y, _, gradient = fed(zeros[:1], zeros, torch.stack([a, g]).to(device), tape=True)
        # Gates are float32, in which the least of them are 0, so that infinity times them is NaN.
        gate, closed = (sigmoid(x).float().double() for x in (g.double(), -g.double()))
        expected = torch.stack([a.double() * gate, gate, a.double() * gate * closed])
        size = a.double().nan_to_num(posinf=0, neginf=0).abs() * 1e-38 + 1e-30
        assert_exact(torch.stack([y[0, 0], *gradient]), expected, dtype, size)
