"""The form "cublas" of `dual_ffn`: torch's products on slices of rows, a kernel between them.

hidden = x · w1ᵀ + b1,  act = act(hidden),  y = act · w2ᵀ + b2   for each kind of rows by itself
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.op_types import FFN
from adatape_kernels.ops.dual_ffn.parameters import Parameters, as_ffns
from adatape_kernels.ops.dual_ffn.triton_primitives import (
    CHUNK,
    activate,
    activate_bwd,
    glu_bwd,
    sigmoid,
)
from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import compiled_for, dense


@compiled_for(aligned=("hidden_ptr", "act_ptr"), sizes=("width",))
def _dual_ffn_act_fwd_kernel(
    hidden_ptr,
    act_ptr,
    bounds_ptr,
    first,
    rows,
    width,
    ACTIVATION: tl.constexpr,
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
    h_ptrs = hidden_ptr + offs_m * (2 * width if ACTIVATION == "glu" else width) + offs_n
    h = tl.load(h_ptrs, used, other=0.0).to(tl.float32)
    if ACTIVATION == "glu":
        act = h * sigmoid(tl.load(h_ptrs + width, used, other=0.0).to(tl.float32))
    else:
        act = activate(h, ACTIVATION)
    tl.store(act_ptr + offs_m * width + offs_n, act.to(act_ptr.dtype.element_ty), exists)
    if bounds_ptr is not None:
        zero = tl.zeros((BLOCK_M, BLOCK_N), act_ptr.dtype.element_ty)
        tl.store(h_ptrs, zero, exists & ~used)
        if ACTIVATION == "glu":
            tl.store(h_ptrs + width, zero, exists & ~used)


@compiled_for(
    aligned=("dact_ptr", "hidden_ptr", "dhidden_ptr", "act_ptr", "db_ptr"), sizes=("width",)
)
def _dual_ffn_act_bwd_kernel(
    dact_ptr,
    hidden_ptr,
    dhidden_ptr,
    act_ptr,
    db_ptr,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dhidden, act(hidden) once more, and the sum of CHUNK rows of dhidden."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = 2 * width if ACTIVATION == "glu" else width
    dtype = act_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        offs_m = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK_M)[:, None]
        mask = (offs_m < rows) & (offs_n < width)
        offsets, h_offsets = offs_m * width + offs_n, offs_m * columns + offs_n
        dact = tl.load(dact_ptr + offsets, mask, other=0.0).to(tl.float32)
        h = tl.load(hidden_ptr + h_offsets, mask, other=0.0).to(tl.float32)
        if ACTIVATION == "glu":
            g = tl.load(hidden_ptr + h_offsets + width, mask, other=0.0).to(tl.float32)
            dh, dg, act = glu_bwd(h, g, dact)
            tl.store(dhidden_ptr + h_offsets + width, dg.to(dtype), mask)
            gate_acc += dg
        else:
            dh, act = activate_bwd(h, dact, ACTIVATION)
        tl.store(dhidden_ptr + h_offsets, dh.to(dtype), mask)
        tl.store(act_ptr + offsets, act.to(dtype), mask)
        acc += dh
    db_ptrs = db_ptr + tl.program_id(0).to(tl.int64) * columns + offs_n
    tl.store(db_ptrs, tl.sum(acc, 0), offs_n < width)
    if ACTIVATION == "glu":
        tl.store(db_ptrs + width, tl.sum(gate_acc, 0), offs_n < width)


class Slice(NamedTuple):
    """One kind of rows, and what they go through."""

    rows: slice
    ffn: FFN
    activation: str
    bounds: Tensor | None
    """As the op has them, if some of the rows are unused."""


def slices(
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> Iterator[Slice]:
    """Yield the input rows and, if they have parameters, the tape rows."""
    input_ffn, tape_ffn = as_ffns(parameters)
    input_bounds = None if max_tape_rows else bounds
    yield Slice(slice(0, max_input_rows), input_ffn, activation=activation, bounds=input_bounds)
    if tape_ffn is not None:
        rows = slice(max_input_rows, max_input_rows + max_tape_rows)
        yield Slice(rows, tape_ffn, activation="glu", bounds=bounds)


def unused_rows(rows: slice, bounds: Tensor) -> Tensor:
    """Return a mask (rows, 1) of those that no example owns."""
    return torch.arange(rows.start, rows.stop, device=bounds.device).unsqueeze(1) >= bounds[1]


def forward(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run two products for each kind of rows; returns y and both pre-activations."""
    bounds = None if bounds is None else bounds.contiguous()
    y = x.new_empty(*x.shape)
    hiddens = []
    for part in slices(max_input_rows, max_tape_rows, bounds, activation, parameters):
        rows, ffn = part.rows, part.ffn
        # The bias goes with the product, which can add it before it stores.
        hidden = torch.addmm(ffn.b1, x[rows], ffn.w1.mT)
        act = x.new_empty(len(hidden), ffn.w2.shape[1])
        launch(
            _dual_ffn_act_fwd_kernel,
            (num_blocks(len(act), 16), num_blocks(act.shape[1], 256)),
            hidden_ptr=hidden,
            act_ptr=act,
            bounds_ptr=part.bounds,
            first=rows.start,
            rows=act.shape[0],
            width=act.shape[1],
            ACTIVATION=part.activation,
            BLOCK_M=16,
            BLOCK_N=256,
            num_warps=4,
        )
        torch.addmm(ffn.b2, act, ffn.w2.mT, out=y[rows])
        if part.bounds is not None:
            y[rows].masked_fill_(unused_rows(rows, part.bounds), 0)
        hiddens.append(hidden)
    y[max_input_rows + max_tape_rows :] = 0
    return y, hiddens[0], hiddens[1] if len(hiddens) == 2 else x.new_empty(0, 0)


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, ...]:
    """Run the products' gradients; returns the gradients of x and of the parameters."""
    hidden, tape_hidden = dense(hidden), dense(tape_hidden)
    dx = x.new_empty(*x.shape)
    grads: list[Tensor] = []
    parts = slices(len(hidden), len(tape_hidden), bounds, activation, parameters)
    for part, h in zip(parts, (hidden, tape_hidden), strict=False):
        dy_rows, x_rows = dy[part.rows], x[part.rows]
        if part.bounds is not None:
            # A product would multiply what stands there by zero, and NaN stays NaN.
            unused = unused_rows(part.rows, part.bounds)
            dy_rows, x_rows = dy_rows.masked_fill(unused, 0), x_rows.masked_fill(unused, 0)
        dact = dy_rows @ part.ffn.w2
        act, dhidden = dact.new_empty(*dact.shape), h.new_empty(*h.shape)
        db1 = h.new_empty(num_blocks(len(h), CHUNK), h.shape[1], dtype=torch.float32)
        launch(
            _dual_ffn_act_bwd_kernel,
            (len(db1), num_blocks(act.shape[1], 128)),
            dact_ptr=dact,
            hidden_ptr=h,
            dhidden_ptr=dhidden,
            act_ptr=act,
            db_ptr=db1,
            rows=act.shape[0],
            width=act.shape[1],
            ACTIVATION=part.activation,
            CHUNK=CHUNK,
            BLOCK_M=8 if act.shape[1] % 16 == 0 else 4,  # narrow accesses take registers
            BLOCK_N=128,
            num_warps=4,
        )
        torch.mm(dhidden, part.ffn.w1, out=dx[part.rows])
        grads += dhidden.mT @ x_rows, db1.sum(0).to(x.dtype), dy_rows.mT @ act, dy_rows.sum(0)
    dx[len(hidden) + len(tape_hidden) :] = 0
    return dx, *grads, *(x.new_empty(0) for _ in range(8 - len(grads)))
