"""Two feed-forwards over one buffer: input rows through one, tape rows through the other (SPEC 6).

input rows: W2 · gelu_tanh(W1 x + b1) + b2
tape rows:  V2 · (a ⊙ sigmoid(g)) + c2,  [a, g] = V1 x + c1

In Triton the products have two forms, `ffn_products`: "cublas" stands here, "grouped" in
dual_ffn_grouped.py.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels._triton import launch, tl, triton
from adatape_kernels.backend import (
    define_autograd,
    define_op,
    register,
    register_compiled,
    register_triton,
)
from adatape_kernels.ops import dual_ffn_grouped
from adatape_kernels.ops.dual_ffn_grouped import CHUNK, gelu, gelu_bwd, glu_bwd
from adatape_kernels.reference import FFN

FFN_PRODUCTS = ("cublas", "grouped")
"""The forms of the products in Triton; the first is the default."""


def dual_ffn(
    x: Tensor,
    num_input_rows: int | Tensor,
    input_ffn: FFN,
    tape_ffn: FFN | None = None,
    *,
    num_rows: int | Tensor | None = None,
) -> Tensor:
    """Send the first rows through one feed-forward and the rest through the other.

    Args:
        x: (rows, dim); float32, float16, bfloat16 or float64; under autocast, cast like a linear
            layer's input.
        num_input_rows: rows of the input segment, an int or an integer scalar on x's device.
        input_ffn: (w1, b1, w2, b2) of shapes (hidden, dim), (hidden,), (dim, hidden), (dim,).
        tape_ffn: the same for a GLU, w1 (2 · hidden, dim) and b1 (2 · hidden,); None sends every
            row through input_ffn.
        num_rows: rows that examples own, an int or an integer scalar on x's device; the rows
            behind are never read. None when that is all of them.

    Returns:
        (rows, dim), dtype of x; zero from row num_rows on.

    Raises:
        ValueError: a shape, dtype, device or row count differs from the above.

    Differentiable in x and all parameters; saves the pre-activations and recomputes the
    activations.

    Source: SPEC 6; scenic adatape/layers.py, MlpBlock.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point (rows, dim), got {x.dtype} {tuple(x.shape)}")
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, input_ffn = x.to(dtype), FFN(*(p.to(dtype) for p in input_ffn))
        tape_ffn = tape_ffn and FFN(*(p.to(dtype) for p in tape_ffn))
    _check_ffn("input_ffn", input_ffn, x, gates=1)
    if tape_ffn is not None:
        _check_ffn("tape_ffn", tape_ffn, x, gates=2)
    rows = x.shape[0]
    end = rows if num_rows is None else num_rows
    middle = end if tape_ffn is None else num_input_rows
    _check_rows("num_input_rows", num_input_rows, x)
    _check_rows("num_rows", end, x)
    if isinstance(middle, int) and isinstance(end, int) and middle > end:
        raise ValueError(f"num_input_rows: expected at most num_rows = {end}, got {middle}")
    # Row counts on the device size the pre-activations by their bounds.
    max_input_rows = rows if isinstance(middle, Tensor) else middle
    max_tape_rows = 0 if tape_ffn is None else _bound(end, rows) - _bound(middle, 0)
    bounds = None
    if isinstance(middle, Tensor) or isinstance(end, Tensor):
        bounds = torch.stack([_scalar(middle, x), _scalar(end, x)])
    y, _, _ = _dual_ffn(x, max_input_rows, max_tape_rows, bounds, *input_ffn, *(tape_ffn or _NONE))
    return y


_NONE = (None, None, None, None)


def _check_ffn(name: str, ffn: FFN, x: Tensor, gates: int) -> None:
    dim, hidden, dtype, device = x.shape[1], ffn[0].shape[0] // gates, x.dtype, x.device
    shapes = ((gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,))
    for field, shape, given in zip(FFN._fields, shapes, ffn, strict=True):
        if given.shape != shape or given.dtype != dtype or given.device != device:
            raise ValueError(
                f"{name}.{field}: expected {dtype} {shape} on {device} to "
                f"fit x, got {given.dtype} {tuple(given.shape)} on {given.device}"
            )


def _check_rows(name: str, count: int | Tensor, x: Tensor) -> None:
    if isinstance(count, Tensor):
        if count.dim() != 0 or count.is_floating_point() or count.device != x.device:
            raise ValueError(
                f"{name}: expected an int or an integer scalar on {x.device}, "
                f"got {count.dtype} {tuple(count.shape)} on {count.device}"
            )
    elif not 0 <= count <= x.shape[0]:
        raise ValueError(f"{name}: expected 0 to {x.shape[0]} (the rows of x), got {count}")


def _bound(count: int | Tensor, otherwise: int) -> int:
    return otherwise if isinstance(count, Tensor) else count


def _scalar(count: int | Tensor, x: Tensor) -> Tensor:
    # An int by a fill: a CUDA graph cannot capture a copy from the host.
    return count.long() if isinstance(count, Tensor) else x.new_full((), count, dtype=torch.int64)


def _fake(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    tape_w1: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
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
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters),
    )


class _Chosen(threading.local):
    products: str = FFN_PRODUCTS[0]


_chosen = _Chosen()


@contextlib.contextmanager
def ffn_products(name: str) -> Iterator[None]:
    """Choose, on this thread, how the Triton backend of `dual_ffn` runs its products.

    "cublas": torch's products on the two slices of rows, one Triton kernel between them; needs
    num_input_rows on the host. "grouped": both kinds of rows in one Triton launch a product, which
    also serves wherever "cublas" cannot. A backward takes its forward's.

    Raises:
        ValueError: the name is neither.
    """
    if name not in FFN_PRODUCTS:
        raise ValueError(f"ffn_products: expected one of {', '.join(FFN_PRODUCTS)}, got {name!r}")
    previous, _chosen.products = _chosen.products, name
    try:
        yield
    finally:
        _chosen.products = previous


@triton.jit
def _dual_ffn_act_fwd_kernel(
    hidden_ptr,
    act_ptr,
    bounds_ptr,
    first,
    rows,
    width,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """act(hidden) for a slice of rows; hidden becomes zero in unused rows."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (offs_m < rows) & (offs_n < width)
    used = exists
    if bounds_ptr is not None:
        used = exists & (first + offs_m < tl.load(bounds_ptr + 1))
    h_ptrs = hidden_ptr + offs_m * (2 * width if GATED else width) + offs_n
    h = tl.load(h_ptrs, used, other=0.0).to(tl.float32)
    if GATED:
        act = h * tl.sigmoid(tl.load(h_ptrs + width, used, other=0.0).to(tl.float32))
    else:
        act = gelu(h)
    tl.store(act_ptr + offs_m * width + offs_n, act.to(act_ptr.dtype.element_ty), exists)
    if bounds_ptr is not None:
        zero = tl.zeros((BLOCK_M, BLOCK_N), act_ptr.dtype.element_ty)
        tl.store(h_ptrs, zero, exists & ~used)
        if GATED:
            tl.store(h_ptrs + width, zero, exists & ~used)


@triton.jit
def _dual_ffn_act_bwd_kernel(
    dact_ptr,
    hidden_ptr,
    dhidden_ptr,
    act_ptr,
    db_ptr,
    rows,
    width,
    GATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dhidden, act(hidden) once more, and the sum of CHUNK rows of dhidden."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = 2 * width if GATED else width
    dtype = act_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        offs_m = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK_M)[:, None]
        mask = (offs_m < rows) & (offs_n < width)
        offsets, h_offsets = offs_m * width + offs_n, offs_m * columns + offs_n
        dact = tl.load(dact_ptr + offsets, mask, other=0.0).to(tl.float32)
        h = tl.load(hidden_ptr + h_offsets, mask, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(hidden_ptr + h_offsets + width, mask, other=0.0).to(tl.float32)
            dh, dg, act = glu_bwd(h, g, dact)
            tl.store(dhidden_ptr + h_offsets + width, dg.to(dtype), mask)
            gate_acc += dg
        else:
            dh, act = gelu_bwd(h, dact)
        tl.store(dhidden_ptr + h_offsets, dh.to(dtype), mask)
        tl.store(act_ptr + offsets, act.to(dtype), mask)
        acc += dh
    db_ptrs = db_ptr + tl.program_id(0).to(tl.int64) * columns + offs_n
    tl.store(db_ptrs, tl.sum(acc, 0), offs_n < width)
    if GATED:
        tl.store(db_ptrs + width, tl.sum(gate_acc, 0), offs_n < width)


_PARAMETERS = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
    "Tensor? tape_w1, Tensor? tape_b1, Tensor? tape_w2, Tensor? tape_b2"
)
_dual_ffn = define_op(
    "dual_ffn(Tensor x, SymInt max_input_rows, SymInt max_tape_rows, Tensor? bounds, "
    f"{_PARAMETERS}) -> (Tensor y, Tensor hidden, Tensor tape_hidden)",
    _fake,
)
_dual_ffn_bwd = define_op(
    "dual_ffn_bwd(Tensor dy, Tensor x, Tensor hidden, Tensor tape_hidden, Tensor? bounds, "
    f"{_PARAMETERS}) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, "
    "Tensor dtape_w1, Tensor dtape_b1, Tensor dtape_w2, Tensor dtape_b2)",
    _fake_bwd,
)


def _row_counts(max_input_rows: int, max_tape_rows: int, bounds: Tensor | None) -> tuple[int, int]:
    """Return the numbers of input and tape rows; reads the device where it holds them."""
    if bounds is None:
        return max_input_rows, max_tape_rows
    middle, end = bounds.tolist()
    return middle, end - middle


@register("dual_ffn", "eager")
def _eager(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, tapes = _row_counts(max_input_rows, max_tape_rows, bounds)
    if not (0 <= inputs and 0 <= tapes and inputs + tapes <= len(x)):
        raise ValueError(
            f"num_input_rows: expected 0 <= num_input_rows <= num_rows <= {len(x)} (the rows of "
            f"x), got {inputs} and {inputs + tapes}"
        )
    input_ffn, tape_ffn = _pack(parameters)
    y, hidden, tape_hidden = reference.dual_ffn(
        x, inputs, input_ffn, tape_ffn, num_rows=inputs + tapes
    )
    return (
        y,
        F.pad(hidden, (0, 0, 0, max_input_rows - inputs)),
        F.pad(tape_hidden, (0, 0, 0, max_tape_rows - tapes)),
    )


@register("dual_ffn_bwd", "eager")
def _eager_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs, tapes = _row_counts(len(hidden), len(tape_hidden), bounds)
    input_ffn, tape_ffn = _pack(parameters)
    dx, dinput, dtape = reference.dual_ffn_bwd(
        dy, x, hidden[:inputs], tape_hidden[:tapes], input_ffn, tape_ffn
    )
    return dx, *dinput, *(dtape or [x.new_empty(0) for _ in FFN._fields])


@register_triton("dual_ffn")
def _triton(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if _chosen.products == "grouped" or not middle_on_host(x, max_input_rows, max_tape_rows):
        return dual_ffn_grouped.forward(x, max_input_rows, max_tape_rows, bounds, *parameters)
    y = x.new_empty(x.shape)
    hiddens = []
    for rows, ffn, gated, limit in _slices(max_input_rows, max_tape_rows, bounds, parameters):
        # The bias goes with the product, which can add it before it stores.
        hidden = torch.addmm(ffn.b1, x[rows], ffn.w1.mT)
        act = x.new_empty(len(hidden), ffn.w2.shape[1])
        launch(
            _dual_ffn_act_fwd_kernel,
            (triton.cdiv(len(act), 16), triton.cdiv(act.shape[1], 256)),
            hidden,
            act,
            limit,
            rows.start,
            *act.shape,
            GATED=gated,
            BLOCK_M=16,
            BLOCK_N=256,
            num_warps=4,
        )
        torch.addmm(ffn.b2, act, ffn.w2.mT, out=y[rows])
        if limit is not None:
            y[rows].masked_fill_(_unused(rows, limit), 0)
        hiddens.append(hidden)
    y[max_input_rows + max_tape_rows :] = 0
    return y, hiddens[0], hiddens[1] if len(hiddens) == 2 else x.new_empty(0, 0)


@register_triton("dual_ffn_bwd")
def _triton_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    if _chosen.products == "grouped" or not middle_on_host(x, len(hidden), len(tape_hidden)):
        return dual_ffn_grouped.backward(dy, x, hidden, tape_hidden, bounds, *parameters)
    dx = x.new_empty(x.shape)
    grads: list[Tensor] = []
    slices = _slices(len(hidden), len(tape_hidden), bounds, parameters)
    for (rows, ffn, gated, limit), h in zip(slices, (hidden, tape_hidden), strict=False):
        dy_rows, x_rows = dy[rows], x[rows]
        if limit is not None:
            # A product would multiply what stands there by zero, and NaN stays NaN.
            unused = _unused(rows, limit)
            dy_rows, x_rows = dy_rows.masked_fill(unused, 0), x_rows.masked_fill(unused, 0)
        dact = dy_rows @ ffn.w2
        act, dhidden = dact.new_empty(dact.shape), h.new_empty(h.shape)
        db1 = h.new_empty(triton.cdiv(len(h), CHUNK), h.shape[1], dtype=torch.float32)
        launch(
            _dual_ffn_act_bwd_kernel,
            (len(db1), triton.cdiv(act.shape[1], 128)),
            dact,
            h,
            dhidden,
            act,
            db1,
            *act.shape,
            GATED=gated,
            CHUNK=CHUNK,
            BLOCK_M=8,
            BLOCK_N=128,
            num_warps=4,
        )
        torch.mm(dhidden, ffn.w1, out=dx[rows])
        grads += dhidden.mT @ x_rows, db1.sum(0).to(x.dtype), dy_rows.mT @ act, dy_rows.sum(0)
    dx[len(hidden) + len(tape_hidden) :] = 0
    return dx, *grads, *(x.new_empty(0) for _ in range(8 - len(grads)))


def middle_on_host(x: Tensor, max_input_rows: int, max_tape_rows: int) -> bool:
    """Return whether the host knows where the tape rows start.

    Where it does not, all rows bound the input rows, and the two bounds sum to more.
    """
    return max_input_rows + max_tape_rows <= len(x)


def _slices(
    max_input_rows: int, max_tape_rows: int, bounds: Tensor | None, parameters: tuple
) -> Iterator[tuple[slice, FFN, bool, Tensor | None]]:
    """Yield each kind's rows, its parameters, whether gated, and the bounds if some are unused."""
    input_ffn, tape_ffn = _pack(parameters)
    yield slice(0, max_input_rows), input_ffn, False, None if max_tape_rows else bounds
    if tape_ffn is not None:
        yield slice(max_input_rows, max_input_rows + max_tape_rows), tape_ffn, True, bounds


def _unused(rows: slice, bounds: Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=bounds.device).unsqueeze(1) >= bounds[1]


register_compiled("dual_ffn")
register_compiled("dual_ffn_bwd")


def _pack(parameters: tuple) -> tuple[FFN, FFN | None]:
    return FFN(*parameters[:4]), None if parameters[4] is None else FFN(*parameters[4:])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, _, bounds, *parameters = inputs
    _, hidden, tape_hidden = output
    ctx.save_for_backward(x, hidden, tape_hidden, bounds, *parameters)
    ctx.set_materialize_grads(False)  # the pre-activations have none, and are large
    ctx.products = _chosen.products


def _backward(ctx: Any, dy: Tensor, dhidden: Any, dtape_hidden: Any) -> tuple:
    with ffn_products(ctx.products):
        dx, *grads = _dual_ffn_bwd(dy, *ctx.saved_tensors)
    saved = ctx.saved_tensors[4:]
    return (
        dx,
        None,
        None,
        None,
        *(None if p is None else g for p, g in zip(saved, grads, strict=True)),
    )


define_autograd("dual_ffn", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.dual_ffn)
def _flops(
    x_shape: Any,
    max_input_rows: int,
    max_tape_rows: int,
    bounds_shape: Any,
    *shapes: Any,
    **kw: Any,
) -> int:
    """One multiply-add a weight and row; rows by their bound where the device holds the number."""
    w1, _, w2, _, tape_w1, _, tape_w2, _ = shapes
    flops = 2 * max_input_rows * (math.prod(w1) + math.prod(w2))
    if tape_w1 is not None:
        flops += 2 * max_tape_rows * (math.prod(tape_w1) + math.prod(tape_w2))
    return flops


@register_flop_formula(torch.ops.adatape.dual_ffn_bwd)
def _flops_bwd(
    dy_shape: Any,
    x_shape: Any,
    hidden_shape: Any,
    tape_hidden_shape: Any,
    bounds_shape: Any,
    *shapes: Any,
    **kw: Any,
) -> int:
    """Each product has two gradients of its own size."""
    return 2 * _flops(x_shape, hidden_shape[0], tape_hidden_shape[0], bounds_shape, *shapes)
