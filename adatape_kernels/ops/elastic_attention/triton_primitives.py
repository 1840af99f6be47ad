"""What both directions of `elastic_attention` in Triton share: tiles over the rows of an example.

The rows of an example lie in two ranges of one buffer (SPEC 5).
Row r of an example is row cu_inputs[i] + r of the buffer while r is less than the example's number
of inputs, and a tape row behind that. Kernels count tiles over r and load rows by computed address.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.device_facts import DeviceFacts
from adatape_kernels.ops.triton_runtime import tl, triton
from adatape_kernels.ops.triton_specialization import ALIGNMENT

MAX_HEAD_DIM = 256
"""Widest head whose tiles fit a multiprocessor."""


def limits(device: DeviceFacts, rows: Tensor, *rest: Any) -> str | None:
    """State which calls are served: by the heads of the rows that come first in both directions."""
    head_dim = rows.shape[-1]
    if head_dim <= MAX_HEAD_DIM:
        return None
    return f"it takes heads of up to {MAX_HEAD_DIM} features, not {head_dim}"


@functools.cache
def options_of(dtype: torch.dtype, head_dim: int, *, backward: bool) -> dict[str, int]:
    """Choose tiles by dtype and head_dim alone: an example's bits may not follow its batch.

    VECTOR are the elements of the widest access by which heads of this width can be read.

    float32 goes without tensor cores: by three products of TF32 parts its gradients would have up
    to 12 times the error of torch's float32, and large numbers would become NaN. The page about
    GPUs' performance has the numbers.
    """
    if dtype == torch.float32:  # operands in registers
        narrow = backward and head_dim <= 32  # tiles of 32 × 32 would fill all 255 registers
        block_m, block_n = 32, 16 if narrow or head_dim > 64 else 32
        num_warps = 4 if head_dim <= 32 else 8
        # Where a block may have 99 KiB, more tiles under way would leave room for one program.
        num_stages = 3 if head_dim <= 64 and not backward else 2
    else:
        block_m = 32 if backward and head_dim > 128 else 64
        block_n = 32 if backward or head_dim <= 16 or head_dim > 128 else 64
        num_warps = 4 if head_dim <= 64 else 8
        num_stages = 3 if head_dim <= 128 else 2
    return {
        "HEAD_DIM": head_dim,
        "VECTOR": math.gcd(ALIGNMENT // dtype.itemsize, head_dim),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


class ExamplePlace(NamedTuple):
    """Where an example's rows lie in the buffer; in kernels, of scalars."""

    first_input: Any
    num_inputs: Any
    first_tape: Any
    num_rows: Any
    """Inputs and tape together."""


class Tile(NamedTuple):
    """A block of an example's rows; in kernels, of blocks."""

    row: Any
    """Rows of the buffer, int64."""
    exists: Any
    """Which of them the example has."""


def num_tiles(rows: int, batch: int, block: int) -> int:
    """Return how many numbers `find_tile` knows: all tiles of `block` rows, and a few without."""
    return rows // block + batch + 1 if rows else 0


@triton.jit
def find_tile(
    number,
    cu_inputs_ptr,
    cu_tapes_ptr,
    rows,
    batch,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr = 256,
):
    """Return the example and the tile of it that has a number, and for `tile_rows` its place.

    With c rows in the examples before it, the tiles of example i are numbered from c // BLOCK + i.
    That leaves room for all of them, at most one number too many, and takes no sum over tiles.
    Behind the last example stands one more, without inputs, whose tape is the unused rows.

    Corrupt offsets lead to a tile that does not exist or to wrong rows, never outside the buffer.
    """
    first_of_all = tl.load(cu_tapes_ptr)
    example, span = 0, batch
    while span > 0:  # the example sought is one of `example` to `example + span`
        step = tl.cdiv(span, WIDTH)
        i = example + step * (1 + tl.arange(0, WIDTH))
        before = tl.load(cu_inputs_ptr + i, i <= batch, other=0) - first_of_all
        before += tl.load(cu_tapes_ptr + i, i <= batch, other=0)
        example += step * tl.sum(((before // BLOCK + i <= number) & (i <= batch)).to(tl.int32))
        span = step - 1

    real = example < batch
    first_input = tl.load(cu_inputs_ptr + example)
    first_tape = tl.load(cu_tapes_ptr + example)
    tile = number - (first_input - first_of_all + first_tape) // BLOCK - example
    end_input = tl.load(cu_inputs_ptr + example + 1, real, other=0)
    end_tape = tl.load(cu_tapes_ptr + example + 1, real, other=rows)
    first_input = tl.minimum(tl.maximum(first_input, 0), rows)
    first_tape = tl.minimum(tl.maximum(first_tape, 0), rows)
    num_inputs = tl.minimum(tl.maximum(end_input, first_input), rows) - first_input
    num_tapes = tl.minimum(tl.maximum(end_tape, first_tape), rows) - first_tape
    num_rows = num_inputs + tl.minimum(num_tapes, rows - num_inputs)
    exists = (tile >= 0) & (tile < tl.cdiv(num_rows, BLOCK))
    place = ExamplePlace(
        first_input=first_input, num_inputs=num_inputs, first_tape=first_tape, num_rows=num_rows
    )
    return example, tl.where(exists, tile, -1), place


@triton.jit
def tile_rows(place, start, BLOCK: tl.constexpr, FULL: tl.constexpr = False):
    """Return the buffer's rows that hold an example's rows from `start` on, and which exist.

    The caller may know that the tile is FULL.
    """
    offs = start + tl.arange(0, BLOCK)
    in_inputs = offs < place.num_inputs
    row = offs + tl.where(in_inputs, place.first_input, place.first_tape - place.num_inputs)
    exists = tl.full((BLOCK,), 1, tl.int1) if FULL else offs < place.num_rows
    return Tile(row=row.to(tl.int64), exists=exists)


@triton.jit
def load_tile(matrix, rows, columns, VECTOR: tl.constexpr, ZEROS: tl.constexpr = True):
    """Load rows of a matrix (pointer, stride); what does not exist is zero, or undefined."""
    ptr, stride = matrix
    offs_d, mask_d = columns
    ptrs = ptr + tl.multiple_of(rows.row * stride, VECTOR)[:, None] + offs_d
    mask = rows.exists[:, None] & mask_d
    return tl.load(ptrs, mask, other=0.0) if ZEROS else tl.load(ptrs, mask)


@triton.jit
def store_tile(matrix, rows, columns, x, VECTOR: tl.constexpr):
    """Store what exists of a tile, in the matrix's dtype."""
    ptr, stride = matrix
    offs_d, mask_d = columns
    ptrs = ptr + tl.multiple_of(rows.row * stride, VECTOR)[:, None] + offs_d
    tl.store(ptrs, x.to(ptr.dtype.element_ty), rows.exists[:, None] & mask_d)
