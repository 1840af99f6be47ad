"""Tiles over the rows of each example, which lie in two ranges of one buffer (SPEC 5).

Row r of an example is row cu_inputs[i] + r of the buffer while r is less than the example's number
of inputs, and a tape row behind that. Kernels count tiles over r and load rows by computed address.
"""

from adatape_kernels._triton import tl, triton


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
    return example, tl.where(exists, tile, -1), (first_input, num_inputs, first_tape, num_rows)


@triton.jit
def tile_rows(place, start, BLOCK: tl.constexpr, FULL: tl.constexpr = False):
    """Return the buffer's rows that hold an example's rows from `start` on, and which exist.

    The caller may know that the tile is FULL.
    """
    first_input, num_inputs, first_tape, num_rows = place
    offs = start + tl.arange(0, BLOCK)
    row = offs + tl.where(offs < num_inputs, first_input, first_tape - num_inputs)
    exists = tl.full((BLOCK,), 1, tl.int1) if FULL else offs < num_rows
    return row.to(tl.int64), exists


@triton.jit
def load_tile(matrix, rows, columns, VECTOR: tl.constexpr):
    """Load rows of a matrix (pointer, stride), zero where a row or column does not exist."""
    ptr, stride = matrix
    row, mask_m = rows
    offs_d, mask_d = columns
    ptrs = ptr + tl.multiple_of(row * stride, VECTOR)[:, None] + offs_d
    return tl.load(ptrs, mask_m[:, None] & mask_d, other=0.0)


@triton.jit
def store_tile(matrix, rows, columns, x, VECTOR: tl.constexpr):
    """Store what exists of a tile, in the matrix's dtype."""
    ptr, stride = matrix
    row, mask_m = rows
    offs_d, mask_d = columns
    ptrs = ptr + tl.multiple_of(row * stride, VECTOR)[:, None] + offs_d
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask_m[:, None] & mask_d)
