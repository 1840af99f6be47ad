"""The activations of `dual_ffn`: values and slopes, also at the ends of the numbers."""

import functools
import math

import literal
import pytest
import torch
import torch.nn.functional as F
from checks import (
    assert_close,
    assert_low_precision,
    assert_same_bits,
    interpreted,
    opcheck,
    refused,
)
from ffn_cases import by_reference, double, gradients, inputs, not_served, other_form_has_it
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels.activations import activate
from adatape_kernels.op_types import ACTIVATIONS
from adatape_kernels.ops import FFN, FFN_PRODUCTS, dual_ffn
from adatape_kernels.ops.op import current_backend, operation

OP = "dual_ffn"
pytestmark = [
    pytest.mark.usefixtures("products"),
    pytest.mark.absent_if(reason=not_served),
    pytest.mark.parametrize("activation", ACTIVATIONS),
]
LITERAL = {"gelu_tanh": literal.gelu_tanh, "gelu": literal.gelu, "relu": literal.relu}
TORCH = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def slope(activation, x):
    """The derivative at each number, in float64 and by its definition."""
    if activation == "relu":
        return (x > 0).double()
    if activation == "gelu":
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density
    x = x.requires_grad_()
    return torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]


def through(numbers, activation, device, dtype):
    """The op's activation of numbers, and its slope there: a feed-forward that changes nothing."""
    one, zero = (torch.full((1, 1), n, device=device, dtype=dtype) for n in (1.0, 0.0))
    ffn = FFN(one, zero[0], one, zero[0])
    x = numbers.to(device, dtype).unsqueeze(1).requires_grad_()
    y = dual_ffn(x, len(x), ffn, activation=activation)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach().flatten(), dx.flatten()


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_matches_the_literal_loop(device, activation, two, on_device):
    x, input_ffn, tape_ffn, _ = inputs(11, device=device)
    middle, end = (torch.tensor(n, device=device) if on_device else n for n in (5, 9))
    tape_ffn = tape_ffn if two else None
    y = dual_ffn(x, middle, input_ffn, tape_ffn, num_rows=end, activation=activation)
    expected = literal.dual_ffn(
        x.tolist(),
        5,
        [p.tolist() for p in input_ffn],
        tape_ffn and [p.tolist() for p in tape_ffn],
        9,
        LITERAL[activation],
    )
    assert_close(y, torch.tensor(expected, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype, activation):
    x, input_ffn, tape_ffn, _ = inputs(7, device=device, dtype=dtype, dim=3, hidden=4)

    def run(x, *parameters):
        ffns = FFN(*parameters[:4]), FFN(*parameters[4:])
        return dual_ffn(x, 4, *ffns, num_rows=6, activation=activation)

    given = [x, *input_ffn, *tape_ffn]
    assert torch.autograd.gradcheck(run, [p.requires_grad_() for p in given])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_backward_is_the_reference_s(device, activation, on_device, dtype):
    sizes = dict(dim=24, hidden=70, tape_hidden=33)
    x, input_ffn, tape_ffn, dy = inputs(100, device=device, dtype=dtype, **sizes)
    middle, end = (torch.tensor(n, device=device) if on_device else n for n in (70, 90))
    run = functools.partial(dual_ffn, activation=activation)
    actual = gradients(run, x, middle, input_ffn, tape_ffn, dy, end)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    by_definition = functools.partial(by_reference, activation=activation)
    expected = gradients(by_definition, x, 70, *ffns, dy, 90)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype, activation):
    sizes = dict(dim=48, hidden=96, tape_hidden=32)
    x, input_ffn, tape_ffn, dy = inputs(64, device=device, dtype=dtype, **sizes)
    if activation == "relu":  # its slope jumps at 0, where rounding may turn a sign
        input_ffn = input_ffn._replace(b1=8 * input_ffn.b1.sign())
    run = functools.partial(dual_ffn, activation=activation)
    actual = gradients(run, x, 50, input_ffn, tape_ffn, dy)

    def plain(x, middle, a, b, num_rows):
        act = TORCH[activation](F.linear(x[:middle], a.w1, a.b1))
        glu = F.glu(F.linear(x[middle:], b.w1, b.b1))
        return torch.cat([F.linear(act, a.w2, a.b2), F.linear(glu, b.w2, b.b2)])

    rounded = gradients(plain, x, 50, input_ffn, tape_ffn, dy)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    exact = gradients(functools.partial(by_reference, activation=activation), x, 50, *ffns, dy)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == dtype
        assert_low_precision(a, r, e, floor=1e-6)


@pytest.mark.absent_if(reason=other_form_has_it)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_as_exact_as_torch_s(device, dtype, activation):
    """Over the range in which they bend, and beyond; the error is relative to 1 + |x|."""
    count = 561 if interpreted(device) else 2801
    numbers = torch.cat([torch.linspace(-14, 14, count), torch.tensor([-80.0, 1e3, -1e3])])
    numbers = numbers.to(dtype)
    y, dx = through(numbers, activation, device, dtype)
    exact = numbers.double()
    act = exact / 2 * torch.special.erfc(-exact / math.sqrt(2))  # 1 + erf has no digits left at -9
    act = act if activation == "gelu" else TORCH[activation](exact)
    rounding = torch.finfo(dtype).eps
    for actual, expected in ((y, act), (dx, slope(activation, exact))):
        error = (actual.double().cpu() - expected.detach()).abs() / (1 + exact.abs())
        assert error.max() <= 2 * rounding + 5e-7, (error.max(), numbers[error.argmax()])


@pytest.mark.absent_if(reason=other_form_has_it)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_limits(device, dtype, activation):
    """Values and slopes far out, and at ±infinity."""
    largest = torch.finfo(dtype).max / 2
    numbers = torch.tensor([-largest, -50, 50, largest, math.nan, math.inf, -math.inf])
    far = slice(0, 4)
    values, slopes = through(numbers, activation, device, dtype)
    assert_close(values[far], numbers[far].to(dtype).clamp(min=0), 1e-6)
    assert_close(slopes[far], (numbers[far] > 0).double(), 1e-6)
    assert values[4].isnan()
    assert values[5:].tolist() == [math.inf, 0]
    assert slopes[5:].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32])
def test_relu_has_no_slope_at_zero(device, dtype, activation):
    _, slopes = through(torch.tensor([0.0, -0.0]), activation, device, dtype)
    assert slopes.tolist() == ([0, 0] if activation == "relu" else [0.5, 0.5])


def test_poison_stays_in_its_row(device, activation):
    x, input_ffn, tape_ffn, dy = inputs(12, device=device)
    run = functools.partial(dual_ffn, activation=activation)
    clean = gradients(run, x, 6, input_ffn, tape_ffn, dy, 10)
    x, dy = x.clone(), dy.clone()
    x[2] = x[10:] = dy[2] = dy[10:] = math.nan
    dirty = gradients(run, x, 6, input_ffn, tape_ffn, dy, 10)
    others = [r for r in range(12) if r != 2]
    for n in (0, 1):
        assert_close(dirty[n][others], clean[n][others], 1e-6)
        assert not dirty[n][10:].any() and dirty[n][2].isnan().all()
    for n in range(6, 10):
        assert_close(dirty[n], clean[n], 1e-6)


def _each_once(device, backend, products, activation, on_device=False, **parameters):
    """In Triton's interpreter each activation meets each form, and each kind of counts, once."""
    slow = device == "cpu" and backend == "triton"
    turn = ACTIVATIONS.index(activation) + FFN_PRODUCTS.index(products) + on_device
    return "its neighbour has it" if slow and turn % 2 else None


@pytest.mark.absent_if(reason=_each_once)
@pytest.mark.compiles
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_opcheck(device, activation, on_device):
    x, input_ffn, tape_ffn, dy = inputs(9, device=device)
    for p in (x, *input_ffn, *tape_ffn):
        p.requires_grad_()
    bounds = torch.tensor([5, 8], device=device) if on_device else None
    args = (None, 9, bounds) if on_device else (5, 4, bounds)
    parameters = activation, *input_ffn, *tape_ffn
    opcheck(torch.ops.adatape.dual_ffn.default, (x, *args, *parameters))
    _, *saved = torch.ops.adatape.dual_ffn.default(x, *args, *parameters)
    back = (dy, x, *(s.detach() for s in saved), args[0], bounds, *parameters)
    opcheck(torch.ops.adatape.dual_ffn_bwd.default, [_detached(a) for a in back])


def _detached(argument):
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


@pytest.mark.absent_if(reason=_each_once)
@pytest.mark.compiles
def test_compiles(fresh_compiler, device, activation):
    x, *ffns, dy = inputs(11, device=device)
    run = functools.partial(dual_ffn, activation=activation)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    actual = gradients(compiled, x, 7, *ffns, dy, 9)
    for a, e in zip(actual, gradients(run, x, 7, *ffns, dy, 9), strict=True):
        assert_same_bits(a, e)


def test_flops_are_the_same(device, activation):
    x, *ffns, dy = inputs(12, device=device)
    counts = []
    for name in ("gelu_tanh", activation):
        with FlopCounterMode(display=False) as counter:
            gradients(functools.partial(dual_ffn, activation=name), x, 7, *ffns, dy)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.runs_no_op
def test_an_unknown_activation_is_refused(device, activation):
    x, *ffns, _ = inputs(3, device=device)
    with refused("activation", "gelu_tanh, gelu, relu", f"'{activation}!'"):
        dual_ffn(x, 2, *ffns, activation=f"{activation}!")


@pytest.mark.backends("cpp", "cuda")
@pytest.mark.runs_no_op
def test_the_kernels_refuse_an_unknown_activation(device, activation):
    """Below the dispatcher and the public function, each way."""
    x, *ffns, dy = inputs(9, device=device)
    unknown = f"{activation}!"
    parameters = unknown, *ffns[0], *ffns[1]
    forward, backward = (
        operation(op).implementations[current_backend()].function for op in (OP, "dual_ffn_bwd")
    )
    with refused("activation", "'gelu_tanh', 'gelu' or 'relu'", f"'{unknown}'"):
        forward(x, 5, 4, None, *parameters)
    with refused("activation", "'gelu_tanh', 'gelu' or 'relu'", f"'{unknown}'"):
        backward(dy, x, x.new_zeros(5, 8), x.new_zeros(4, 10), 5, None, *parameters)


@pytest.mark.no_backend
def test_the_reference_is_torch_s(device, activation):
    x = torch.randn(50, device=device, dtype=torch.float64)
    assert_same_bits(activate(x, activation), TORCH[activation](x))
