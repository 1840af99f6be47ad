"""The kernels of the form "grouped" of `dual_ffn`: persistent products over both kinds of rows.

Rows of x, y and their gradients are the buffer's: inputs up to `middle`, tape from there up to
`end`, which may stand on the device. All else comes in pairs, the input rows' and the tape rows',
where each kind's rows count from 0.
"""

from adatape_kernels.ops.dual_ffn.triton_tiles import multiply, num_tiles, place, segments
from adatape_kernels.ops.triton_runtime import tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for


@triton.jit
def _of(tape, pair):
    return tl.where(tape, pair[1], pair[0])


@compiled_for(aligned=("out_ptr", "a_ptrs", "w_ptrs", "b_ptrs"), sizes=("dim", "depths"))
def _dual_ffn_down_kernel(
    out_ptr,
    a_ptrs,
    w_ptrs,
    b_ptrs,
    bounds_ptr,
    rows,
    max_input_rows,
    max_tape_rows,
    dim,
    depths,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """y = act · w2ᵀ + b2, or dx = dhidden · w1 where BACKWARD; zero in unused rows."""
    max_rows = max_input_rows, max_tape_rows
    middle, end = segments(bounds_ptr, rows, max_rows, SLICED=False)
    # The last kind's tiles cover the unused rows too.
    input_rows = tl.where(max_rows[1] > 0, middle, rows)
    input_tiles = num_tiles(input_rows, dim, BLOCK_M, BLOCK_N)
    tiles = input_tiles + num_tiles(rows - input_rows, dim, BLOCK_M, BLOCK_N)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tape = number >= input_tiles
        first, used = tl.where(tape, middle, 0), tl.where(tape, end - middle, middle)
        tile_rows = tl.where(tape, rows - input_rows, input_rows)
        tile = number - tl.where(tape, input_tiles, 0)
        row, column = place(tile, tile_rows, dim, BLOCK_M, BLOCK_N)

        offs_m, offs_n = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_m, mask_n = offs_m < used - row, offs_n < dim
        depth = _of(tape, depths)
        if BACKWARD:
            stride_wk = dim
            w_offsets = offs_k[:, None] * dim + offs_n[None, :]
        else:
            stride_wk = 1
            w_offsets = offs_n.to(tl.int64)[None, :] * depth + offs_k[:, None]
        a_ptr = _of(tape, a_ptrs) + row.to(tl.int64) * depth
        acc = multiply(
            a_ptr + (offs_m[:, None] * depth + offs_k[None, :]),
            _of(tape, w_ptrs) + w_offsets,
            1,
            stride_wk,
            tl.where(row < used, depth, 0),
            mask_m,
            mask_n,
        )
        if not BACKWARD:
            acc += tl.load(_of(tape, b_ptrs) + offs_n, mask_n, other=0.0).to(tl.float32)
        out = tl.where(mask_m[:, None], acc, 0.0).to(out_ptr.dtype.element_ty)
        out_ptrs = out_ptr + (first + row).to(tl.int64) * dim + (offs_m[:, None] * dim + offs_n)
        tl.store(out_ptrs, out, (offs_m < tile_rows - row)[:, None] & mask_n)


@compiled_for(aligned=("row_ptr", "own_ptrs", "out_ptrs"), sizes=("dim", "columns"))
def _dual_ffn_weight_kernel(
    row_ptr,
    own_ptrs,
    out_ptrs,
    bounds_ptr,
    rows,
    max_input_rows,
    max_tape_rows,
    dim,
    columns,
    input_splits,
    tape_splits,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SECOND: tl.constexpr,
):
    """dw1 = dhiddenᵀ · x, or dw2 = dyᵀ · act where SECOND; each split over `chunk` rows."""
    max_rows = max_input_rows, max_tape_rows
    middle, end = segments(bounds_ptr, rows, max_rows, SLICED=False)
    if SECOND:
        input_tiles = num_tiles(dim, columns[0], BLOCK_M, BLOCK_N)
        tape_tiles = num_tiles(dim, columns[1], BLOCK_M, BLOCK_N)
    else:
        input_tiles = num_tiles(columns[0], dim, BLOCK_M, BLOCK_N)
        tape_tiles = num_tiles(columns[1], dim, BLOCK_M, BLOCK_N)
    input_parts = input_splits * input_tiles
    parts = input_parts + tape_splits * tape_tiles
    for number in range(tl.program_id(0), parts, tl.num_programs(0)):
        tape = number >= input_parts
        first, used = tl.where(tape, middle, 0), tl.where(tape, end - middle, middle)
        own, own_ptr = _of(tape, columns), _of(tape, own_ptrs)
        part = number - tl.where(tape, input_parts, 0)
        tiles = tl.where(tape, tape_tiles, input_tiles)
        split = part // tiles
        start = (split * chunk).to(tl.int64)
        if SECOND:
            size_m, size_n, first_m, first_n, m_ptr, n_ptr = dim, own, first, 0, row_ptr, own_ptr
        else:
            size_m, size_n, first_m, first_n, m_ptr, n_ptr = own, dim, 0, first, own_ptr, row_ptr

        row, column = place(part % tiles, size_m, size_n, BLOCK_M, BLOCK_N)
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, BLOCK_K)
        mask_m, mask_n = offs_m < size_m, offs_n < size_n
        acc = multiply(
            m_ptr + (first_m + start) * size_m + (offs_r[None, :] * size_m + offs_m[:, None]),
            n_ptr + (first_n + start) * size_n + (offs_r[:, None] * size_n + offs_n[None, :]),
            size_m,
            size_n,
            tl.minimum(used - split * chunk, chunk),
            mask_m,
            mask_n,
        )
        out_rows = split.to(tl.int64) * size_m + offs_m
        tile_ptrs = _of(tape, out_ptrs) + out_rows[:, None] * size_n + offs_n
        tl.store(tile_ptrs, acc.to(out_ptrs[0].dtype.element_ty), mask_m[:, None] & mask_n)


@compiled_for(aligned=("dy_ptr", "sums_ptr"), sizes=("dim",))
def _dual_ffn_row_sums_kernel(
    dy_ptr,
    sums_ptr,
    bounds_ptr,
    rows,
    max_input_rows,
    max_tape_rows,
    dim,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over CHUNK rows of dy, those of each kind apart: (2, programs, dim)."""
    max_rows = max_input_rows, max_tape_rows
    middle, end = segments(bounds_ptr, rows, max_rows, SLICED=False)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < dim
    input_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tape_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        offs_m = (tl.program_id(0) * CHUNK + start + tl.arange(0, BLOCK_M))[:, None]
        dy_ptrs = dy_ptr + offs_m.to(tl.int64) * dim + offs_n
        dy = tl.load(dy_ptrs, (offs_m < end) & mask_n, other=0.0).to(tl.float32)
        input_acc += tl.where(offs_m < middle, dy, 0.0)
        tape_acc += tl.where(offs_m < middle, 0.0, dy)
    sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * dim + offs_n
    tl.store(sums_ptrs, tl.sum(input_acc, 0), mask_n)
    tl.store(sums_ptrs + tl.num_programs(0).to(tl.int64) * dim, tl.sum(tape_acc, 0), mask_n)
