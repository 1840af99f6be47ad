"""Two feed-forwards over one buffer: input rows through one, tape rows through the other (SPEC 6).

input rows: W2 · act(W1 x + b1) + b2,  act = gelu_tanh, gelu or relu
tape rows:  V2 · (a ⊙ sigmoid(g)) + c2,  [a, g] = V1 x + c1
"""

import math
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_tensor
from adatape_kernels.op_types import FFN, Activation
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.dual_ffn import compiled, eager, triton_forms
from adatape_kernels.ops.dual_ffn.ffn_checks import (
    check_activation,
    check_ffn,
    check_four,
    checked_rows,
)
from adatape_kernels.ops.dual_ffn.products import chosen, chosen_products
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable


def dual_ffn(
    x: Tensor,
    num_input_rows: int | Tensor,
    input_ffn: FFN,
    tape_ffn: FFN | None = None,
    *,
    num_rows: int | Tensor | None = None,
    activation: Activation = "gelu_tanh",
) -> Tensor:
    """Send the first rows through one feed-forward and the rest through the other.

    Args:
        x: (rows, dim); float32, float16, bfloat16 or float64; under autocast, cast like a linear
            layer's input.
        num_input_rows: how many rows are inputs, an int or an integer scalar on x's device.
        input_ffn: (w1, b1, w2, b2) of shapes (hidden, dim), (hidden,), (dim, hidden), (dim,).
        tape_ffn: the same for a GLU, w1 (2 · hidden, dim) and b1 (2 · hidden,); None sends every
            row through input_ffn.
        num_rows: rows that examples own, an int or an integer scalar on x's device; the rows
            behind are never read. None when that is all of them.
        activation: that of input_ffn: "gelu_tanh", "gelu" (the exact form) or "relu".

    Returns:
        (rows, dim), dtype of x; zero from row num_rows on.

    Raises:
        ValueError: a shape, dtype, device, row count or activation differs from the above.
        TypeError: an argument is of another type altogether.

    Differentiable in x and all parameters; saves the pre-activations and recomputes the
    activations.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> x = torch.zeros(5, 4)
        >>> inputs = ak.ops.FFN(torch.ones(8, 4), torch.zeros(8), torch.ones(4, 8), torch.ones(4))
        >>> tapes = ak.ops.FFN(torch.ones(6, 4), torch.zeros(6), torch.ones(4, 3), torch.zeros(4))
        >>> ak.ops.dual_ffn(x, 3, inputs, tapes)[:, 0].tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]

    Source: SPEC 6; scenic adatape/layers.py, MlpBlock.
    """
    found = _at_once(x, num_input_rows, input_ffn, tape_ffn, num_rows, activation)
    if found is None:
        found = _by_op(x, num_input_rows, input_ffn, tape_ffn, num_rows, activation)
    y, _, _ = found
    return y


def _at_once(
    x: Tensor,
    num_input_rows: int | Tensor,
    input_ffn: FFN,
    tape_ffn: FFN | None,
    num_rows: int | Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what `Operation.at_once` does, or None where the arguments' types forbid it."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if type(num_input_rows) is not int or (num_rows is not None and type(num_rows) is not int):
        return None
    if not isinstance(input_ffn, (tuple, list)) or len(input_ffn) != 4 or x.dim() == 0:
        return None
    rows, (w1, b1, w2, b2) = len(x), input_ffn
    end = rows if num_rows is None else num_rows
    if tape_ffn is None:
        if not 0 <= num_input_rows <= rows:
            return None
        given = (w1, b1, w2, b2, None, None, None, None)
        return _FORWARD.at_once(x, end, 0, None, activation, *given)
    if not isinstance(tape_ffn, (tuple, list)) or len(tape_ffn) != 4:
        return None
    numbers = num_input_rows, end - num_input_rows
    return _FORWARD.at_once(x, *numbers, None, activation, w1, b1, w2, b2, *tape_ffn)


def _by_op(
    x: Tensor,
    num_input_rows: int | Tensor,
    input_ffn: FFN,
    tape_ffn: FFN | None,
    num_rows: int | Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, and call the op."""
    check_tensor("x", x)
    check_four("input_ffn", input_ffn)
    if tape_ffn is not None:
        check_four("tape_ffn", tape_ffn)
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            "x: expected floating-point of 16 to 64 bits (rows, dim), "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    check_activation(activation)
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, input_ffn = x.to(dtype), FFN(*(p.to(dtype) for p in input_ffn))
        tape_ffn = tape_ffn and FFN(*(p.to(dtype) for p in tape_ffn))
    check_ffn("input_ffn", input_ffn, x, gates=1)
    if tape_ffn is not None:
        check_ffn("tape_ffn", tape_ffn, x, gates=2)
    rows = x.shape[0]
    num_input_rows = checked_rows("num_input_rows", num_input_rows, x)
    end = rows if num_rows is None else checked_rows("num_rows", num_rows, x)
    middle = end if tape_ffn is None else num_input_rows
    if isinstance(middle, int) and isinstance(end, int) and middle > end:
        raise ValueError(f"num_input_rows: expected at most num_rows = {end}, got {middle}")
    max_tape_rows = 0 if tape_ffn is None else _bound(end, rows) - _bound(middle, 0)
    on_device = isinstance(middle, Tensor)
    split = None if on_device and tape_ffn is not None else _bound(middle, rows)
    bounds = None
    if on_device or isinstance(end, Tensor):
        bounds = torch.stack([_scalar(middle, x), _scalar(end, x)])
    parameters = *input_ffn, *(tape_ffn or _NO_FFN)
    return _FORWARD.overload(x, split, max_tape_rows, bounds, activation, *parameters)


_NO_FFN = (None, None, None, None)


def _bound(count: int | Tensor, otherwise: int) -> int:
    return otherwise if isinstance(count, Tensor) else count


def _scalar(count: int | Tensor, x: Tensor) -> Tensor:
    # An int by a fill: a CUDA graph cannot capture a copy from the host.
    return count.long() if isinstance(count, Tensor) else x.new_full((), count, dtype=torch.int64)


def _fake(
    x: Tensor,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    tape_w1: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    max_input_rows = x.shape[0] if num_input_rows is None else num_input_rows
    tape_width = 0 if tape_w1 is None else tape_w1.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(max_input_rows, w1.shape[0]),
        x.new_empty(max_tape_rows, tape_width),
    )


def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: str,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters),
    )


def _check_values_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> None:
    eager.check_row_counts(x, num_input_rows, len(tape_hidden), bounds, activation, *parameters)


def _typical(*, on_host: bool) -> Any:
    """Return what makes a call over 60 rows, the last 10 of which are tape."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        shapes = (256, 64), (256,), (64, 256), (64,), (256, 64), (256,), (64, 128), (64,)
        rows = (50, 10, None) if on_host else (None, 60, meta(2, dtype=torch.int64))
        parameters = (meta(*shape, dtype=dtype) for shape in shapes)
        return meta(60, 64, dtype=dtype), *rows, "gelu_tanh", *parameters

    return make


def _typical_bwd(*, on_host: bool) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x, num_input_rows, max_tape_rows, *rest = _typical(on_host=on_host)(dtype)
        hidden = meta(num_input_rows or 60, 256, dtype=dtype)
        tape_hidden = meta(max_tape_rows, 256, dtype=dtype)
        return x, x, hidden, tape_hidden, num_input_rows, *rest

    return make


def _typical_calls(make: Any) -> dict[str, Any]:
    return {
        "row counts on the host": make(on_host=True),
        "row counts on the device": make(on_host=False),
    }


_PARAMETERS = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
    "Tensor? tape_w1, Tensor? tape_b1, Tensor? tape_w2, Tensor? tape_b2"
)
# num_input_rows says where tape rows start, None where only the device knows; bounds (2,) holds the
# numbers of input rows and of all used rows where one of them is on the device.
_FORWARD = Operation(
    "dual_ffn(Tensor x, SymInt? num_input_rows, SymInt max_tape_rows, Tensor? bounds, "
    f"str activation, {_PARAMETERS}) -> (Tensor y, Tensor hidden, Tensor tape_hidden)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forms.forward,
        "cuda": compiled.cuda_forward,
    },
    typical=_typical_calls(_typical),
    check_arguments=op_checks.dual_ffn,
    check_values=eager.check_row_counts,
)
_BACKWARD = Operation(
    "dual_ffn_bwd(Tensor dy, Tensor x, Tensor hidden, Tensor tape_hidden, SymInt? num_input_rows, "
    f"Tensor? bounds, str activation, {_PARAMETERS}) -> (Tensor dx, Tensor dw1, Tensor db1, "
    "Tensor dw2, Tensor db2, Tensor dtape_w1, Tensor dtape_b1, Tensor dtape_w2, Tensor dtape_b2)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_forms.backward,
        "cuda": compiled.cuda_backward,
    },
    typical=_typical_calls(_typical_bwd),
    check_arguments=op_checks.dual_ffn_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.num_input_rows, _, bounds, ctx.activation, *parameters = inputs
    _, hidden, tape_hidden = output
    ctx.save_for_backward(x, hidden, tape_hidden, bounds, *parameters)
    ctx.set_materialize_grads(False)  # the pre-activations have none, and are large
    ctx.products = chosen_products()


def _backward(ctx: Any, dy: Tensor, dhidden: Any, dtape_hidden: Any) -> tuple:
    x, hidden, tape_hidden, bounds, *parameters = ctx.saved_tensors
    with chosen.only(ctx.products):
        dx, *grads = _BACKWARD.overload(
            dy, x, hidden, tape_hidden, ctx.num_input_rows, bounds, ctx.activation, *parameters
        )
    given = zip(parameters, grads, strict=True)
    return dx, None, None, None, None, *(None if p is None else grad for p, grad in given)


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    return eager.forward.function(*inputs)


def _gradients(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    there = [p for p in parameters if p is not None]

    def fed_forward(x: Tensor, *there: Tensor) -> Tensor:
        given = (*there, *parameters[len(there) :])
        y, _, _ = eager.forward.function(
            x, num_input_rows, len(tape_hidden), bounds, activation, *given
        )
        return y

    grads = gradient_of(fed_forward, (x, *there), (dy,))
    return *grads, *(x.new_empty(0) for _ in parameters[len(there) :])


def _closed_form(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    options = num_input_rows, len(tape_hidden), bounds, activation
    _, hidden, tape_hidden = eager.forward.function(x, *options, *parameters)
    given = dy, x, hidden, tape_hidden, num_input_rows, bounds, activation
    return eager.backward.function(*given, *parameters)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients, _closed_form)


@flop_formula(torch.ops.adatape.dual_ffn)
def _flops(
    x_shape: Any,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds_shape: Any,
    activation: str,
    *shapes: Any,
    **kw: Any,
) -> int:
    """One multiply-add a weight and row; rows by their bound where the device holds the number."""
    w1, _, w2, _, tape_w1, _, tape_w2, _ = shapes
    max_input_rows = x_shape[0] if num_input_rows is None else num_input_rows
    flops = 2 * max_input_rows * (math.prod(w1) + math.prod(w2))
    if tape_w1 is not None:
        flops += 2 * max_tape_rows * (math.prod(tape_w1) + math.prod(tape_w2))
    return flops


@flop_formula(torch.ops.adatape.dual_ffn_bwd)
def _flops_bwd(
    dy_shape: Any,
    x_shape: Any,
    hidden_shape: Any,
    tape_hidden_shape: Any,
    num_input_rows: int | None,
    bounds_shape: Any,
    activation: str,
    *shapes: Any,
    **kw: Any,
) -> int:
    """Each product has two gradients of its own size."""
    rows = hidden_shape[0], tape_hidden_shape[0]
    return 2 * _flops(x_shape, *rows, bounds_shape, activation, *shapes)
