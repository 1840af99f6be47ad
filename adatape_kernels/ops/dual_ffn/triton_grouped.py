"""The form "grouped" of `dual_ffn`: both kinds of rows in one persistent launch a product.

hidden = x · w1ᵀ + b1,  act = act(hidden)        y = act · w2ᵀ + b2
dhidden = act'(hidden) ⊙ (dy · w2)               dx = dhidden · w1
dw1 = dhiddenᵀ · x,  dw2 = dyᵀ · act
"""

import functools
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops.device_facts import facts_of
from adatape_kernels.ops.dual_ffn import triton_up
from adatape_kernels.ops.dual_ffn.parameters import Parameters
from adatape_kernels.ops.dual_ffn.triton_grouped_kernels import (
    _dual_ffn_down_kernel,
    _dual_ffn_row_sums_kernel,
    _dual_ffn_weight_kernel,
)
from adatape_kernels.ops.dual_ffn.triton_primitives import CHUNK
from adatape_kernels.ops.dual_ffn.triton_up import pairs
from adatape_kernels.ops.triton_runtime import launch, num_blocks
from adatape_kernels.ops.triton_specialization import dense


@functools.lru_cache(maxsize=256)
def _tiles(dtype: torch.dtype, own: torch.Size, of_tape: torch.Size) -> dict[str, int]:
    """Return the shape of the products' tiles, by dtype and by whether 16 divides all widths.

    `own` and `of_tape` are the shapes of the second weights. Where 16 does not divide the widths,
    each element of a row is read by itself, and wide tiles would spill registers.
    """
    divided = all(size % 16 == 0 for size in (*own, *of_tape))
    if dtype == torch.float32:
        num_warps = 4 if divided else 8
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=num_warps, num_stages=3)
    if divided:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)


def _num_programs(device: torch.device) -> int:
    """Return how many programs walk the tiles: one a multiprocessor, which their tiles fill."""
    return facts_of(device).multiprocessors


def _row_arguments(x: Tensor, max_rows: tuple[int, int], bounds: Tensor | None) -> dict[str, Any]:
    """Return the arguments of every kernel that tell which rows there are of each kind."""
    (rows, dim), (max_input_rows, max_tape_rows) = x.shape, max_rows
    return dict(
        bounds_ptr=bounds,
        rows=rows,
        max_input_rows=max_input_rows,
        max_tape_rows=max_tape_rows,
        dim=dim,
    )


def forward(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two products; returns y and both pre-activations."""
    bounds = None if bounds is None else bounds.contiguous()
    max_rows = (max_input_rows, max_tape_rows)
    given = pairs(parameters)
    (hidden, tape_hidden), act = triton_up.forward(
        x, max_rows, bounds, activation, given, sliced=False
    )
    own_w2, tape_w2 = given.w2
    rows = _row_arguments(x, max_rows, bounds)
    y = x.new_empty(rows["rows"], rows["dim"])
    launch(
        _dual_ffn_down_kernel,
        (_num_programs(x.device),),
        out_ptr=y,
        a_ptrs=act,
        w_ptrs=given.w2,
        b_ptrs=given.b2,
        depths=(own_w2.shape[1], tape_w2.shape[1]),
        **rows,
        **_tiles(x.dtype, own_w2.shape, tape_w2.shape),
        BACKWARD=False,
    )
    return y, hidden, tape_hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, ...]:
    """Launch the four products; returns the gradients of x and of the parameters."""
    bounds = None if bounds is None else bounds.contiguous()
    dy, x, given = dense(dy), dense(x), pairs(parameters)
    hiddens = dense(hidden), dense(tape_hidden)
    dhidden, act, db1 = triton_up.backward(dy, hiddens, bounds, activation, given, sliced=False)
    own_w2, tape_w2 = given.w2
    dx, tiles = x.new_empty(*x.shape), _tiles(x.dtype, own_w2.shape, tape_w2.shape)
    rows = _row_arguments(x, (hidden.shape[0], tape_hidden.shape[0]), bounds)
    launch(
        _dual_ffn_down_kernel,
        (_num_programs(x.device),),
        out_ptr=dx,
        a_ptrs=dhidden,
        w_ptrs=given.w1,
        b_ptrs=None,
        depths=(hidden.shape[1], tape_hidden.shape[1]),
        **rows,
        **tiles,
        BACKWARD=True,
    )
    dw1 = _weight_gradients(x, dhidden, rows, tiles, second=False)
    dw2 = _weight_gradients(dy, act, rows, tiles, second=True)
    db2 = _row_sums(dy, rows)
    dinput, dtape = zip(dw1, db1, dw2, db2, strict=True)
    absent = (x.new_empty(0) for _ in dtape)
    return dx, *dinput, *(absent if any(p is None for p in parameters) else dtape)


def _weight_gradients(
    rows: Tensor,
    own: tuple[Tensor, ...],
    counts: dict[str, Any],
    tiles: dict[str, int],
    *,
    second: bool,
) -> list[Tensor]:
    """Return both kinds' sum of outer products of `rows`, x or dy, with what is their `own`.

    `second` says that they are dy and the activations, which make the gradient of w2.
    """
    programs = _num_programs(rows.device)
    (inputs, own_columns), (tapes, tape_columns) = own[0].shape, own[1].shape
    dim, columns = rows.shape[1], (own_columns, tape_columns)
    shapes = [(dim, c) if second else (c, dim) for c in columns]
    num_tiles = [
        num_blocks(m, tiles["BLOCK_M"]) * num_blocks(n, tiles["BLOCK_N"]) for m, n in shapes
    ]
    chunk = _rows_of_a_split([inputs, tapes], num_tiles, programs)
    splits = max(1, num_blocks(inputs, chunk)), max(1, num_blocks(tapes, chunk))
    # Of one split too: for another dtype the kernel would be compiled again.
    out = tuple(
        rows.new_empty(n, *s, dtype=torch.float32) for n, s in zip(splits, shapes, strict=True)
    )
    launch(
        _dual_ffn_weight_kernel,
        (programs,),
        row_ptr=rows,
        own_ptrs=own,
        out_ptrs=out,
        columns=columns,
        input_splits=splits[0],
        tape_splits=splits[1],
        chunk=chunk,
        SECOND=second,
        **counts,
        **tiles,
    )
    return [t.sum(0).to(rows.dtype) for t in out]


def _rows_of_a_split(rows: list[int], num_tiles: list[int], programs: int) -> int:
    """Return so many that each program has at most one tile of one split, if that can be."""
    (longest, most), (other, few) = sorted(zip(rows, num_tiles, strict=True), reverse=True)
    splits = (programs - few) * longest // max(1, most * longest + few * other)
    return max(1, num_blocks(num_blocks(longest, max(1, splits)), CHUNK)) * CHUNK


def _row_sums(dy: Tensor, counts: dict[str, Any]) -> list[Tensor]:
    """Return the sums of dy over the rows of each kind."""
    rows, dim = dy.shape
    parts = num_blocks(rows, CHUNK)
    sums = dy.new_empty(2, parts, dim, dtype=torch.float32)
    block_n = 64
    launch(
        _dual_ffn_row_sums_kernel,
        (parts, num_blocks(dim, block_n)),
        dy_ptr=dy,
        sums_ptr=sums,
        CHUNK=CHUNK,
        BLOCK_M=32,
        BLOCK_N=block_n,
        num_warps=4,
        **counts,
    )
    return [s.sum(0).to(dy.dtype) for s in sums]
