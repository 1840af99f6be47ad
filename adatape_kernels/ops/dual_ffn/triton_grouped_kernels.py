"""The kernels of the form "grouped" of `dual_ffn`: persistent products over both kinds of rows.

Rows of x, y and their gradients are the buffer's: inputs up to `middle`, tape from there up to
`end`, which may stand on the device. All else comes in pairs, the input rows' and the tape rows',
where each kind's rows count from 0.
"""

from adatape_kernels.ops.dual_ffn.triton_primitives import activate, activate_bwd, glu_bwd, sigmoid
from adatape_kernels.ops.triton_runtime import tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for


@triton.jit
def _of(tape, pair):
    return tl.where(tape, pair[1], pair[0])


@triton.jit
def _segments(bounds_ptr, rows, max_rows):
    """Return where input rows and tape rows end: inside the tensors, whatever the device says."""
    middle, end = max_rows[0], max_rows[0] + max_rows[1]
    if bounds_ptr is not None:
        middle = tl.minimum(tl.maximum(tl.load(bounds_ptr), 0), max_rows[0]).to(tl.int32)
        last = tl.minimum(middle + max_rows[1], rows)
        end = tl.minimum(tl.maximum(tl.load(bounds_ptr + 1), middle), last).to(tl.int32)
    return middle, end


@triton.jit
def _num_tiles(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)


@triton.jit
def _place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile's first row and column; eight rows of tiles at a time share the L2 cache."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tile // (8 * column_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    within = tile % (8 * column_tiles)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _multiply(
    a_ptrs,  # (BLOCK_M, BLOCK_K)
    b_ptrs,  # (BLOCK_K, BLOCK_N)
    stride_ak,
    stride_bk,
    depth,
    mask_m,
    mask_n,
):
    BLOCK_K: tl.constexpr = a_ptrs.shape[1]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[1]), tl.float32)
    for k in range(0, depth, BLOCK_K):
        mask_k = offs_k < depth - k
        a = tl.load(a_ptrs, mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return acc


@triton.jit
def _quarters(x):
    """Return x's columns in four parts: what follows a product spills if done to all at once."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    left, right = tl.split(tl.permute(tl.reshape(x, (m, 2, 2, n // 4)), (0, 3, 2, 1)))
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def _store_fwd(
    acc,
    hidden_ptrs,
    act_ptrs,
    row,
    column,
    used,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    TAPE: tl.constexpr,
):
    """Store a tile of hidden, zero in unused rows, and its activation in used ones."""
    gates: tl.constexpr = 2 if TAPE else 1
    size: tl.constexpr = acc.shape[1] // (4 * gates)
    dtype = act_ptrs[0].dtype.element_ty
    offs_m = tl.arange(0, acc.shape[0])[:, None]
    exists, mask_m = offs_m < rows - row, offs_m < used - row
    tile_ptr = hidden_ptrs[TAPE] + row.to(tl.int64) * (gates * width)
    act_tile_ptr = act_ptrs[TAPE] + row.to(tl.int64) * width
    parts = _quarters(tl.where(mask_m, acc, 0.0).to(dtype))
    for quarter in tl.static_range(4):
        offs_n = column // gates + quarter * size + tl.arange(0, size)
        mask_n = offs_n < width
        h_ptrs = tile_ptr + offs_m * (gates * width) + offs_n
        # The activation is that of hidden as rounded: what the backward differentiates.
        if TAPE:
            h, g = tl.split(tl.reshape(parts[quarter], (acc.shape[0], size, 2)))
            tl.store(h_ptrs + width, g, exists & mask_n)
            act = h.to(tl.float32) * sigmoid(g.to(tl.float32))
        else:
            h = parts[quarter]
            act = activate(h.to(tl.float32), ACTIVATION)
        tl.store(h_ptrs, h, exists & mask_n)
        tl.store(act_tile_ptr + offs_m * width + offs_n, act.to(dtype), mask_m & mask_n)


@triton.jit
def _store_bwd(
    dact,
    hidden_ptrs,
    dhidden_ptrs,
    act_ptrs,
    db_ptrs,
    row,
    column,
    used,
    width,
    ACTIVATION: tl.constexpr,
    TAPE: tl.constexpr,
):
    """Store a tile of dhidden and of the activation, and dhidden's sums over the tile's rows."""
    gates: tl.constexpr = 2 if TAPE else 1
    size: tl.constexpr = dact.shape[1] // 4
    dtype = act_ptrs[0].dtype.element_ty
    offs_m = tl.arange(0, dact.shape[0])[:, None]
    base = row.to(tl.int64) * width
    db_ptr = db_ptrs[TAPE] + base // dact.shape[0] * gates
    parts = _quarters(dact)
    for quarter in tl.static_range(4):
        offs_n = column + quarter * size + tl.arange(0, size)
        mask_n = offs_n < width
        mask = (offs_m < used - row) & mask_n
        offsets = base * gates + (offs_m * (gates * width) + offs_n)
        h = tl.load(hidden_ptrs[TAPE] + offsets, mask, other=0.0).to(tl.float32)
        if TAPE:
            g = tl.load(hidden_ptrs[TAPE] + offsets + width, mask, other=0.0).to(tl.float32)
            dh, dg, act = glu_bwd(h, g, parts[quarter])
            tl.store(dhidden_ptrs[TAPE] + offsets + width, dg.to(dtype), mask)
            tl.store(db_ptr + width + offs_n, tl.sum(tl.where(mask, dg, 0.0), 0), mask_n)
        else:
            dh, act = activate_bwd(h, parts[quarter], ACTIVATION)
        tl.store(dhidden_ptrs[TAPE] + offsets, dh.to(dtype), mask)
        tl.store(db_ptr + offs_n, tl.sum(tl.where(mask, dh, 0.0), 0), mask_n)
        tl.store(act_ptrs[TAPE] + base + (offs_m * width + offs_n), act.to(dtype), mask)


@compiled_for(
    aligned=("in_ptr", "w_ptrs", "b_ptrs", "hidden_ptrs", "dhidden_ptrs", "act_ptrs"),
    sizes=("dim", "widths"),
)
def _dual_ffn_up_kernel(
    in_ptr,
    w_ptrs,
    b_ptrs,  # b1; where BACKWARD the parts of its gradient, a row for each row of tiles
    hidden_ptrs,
    dhidden_ptrs,
    act_ptrs,
    bounds_ptr,
    rows,
    max_input_rows,
    max_tape_rows,
    dim,
    widths,
    ACTIVATION: tl.constexpr,  # of the input rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Get hidden and act from x; where BACKWARD, dhidden, act and db1 from dy."""
    gates: tl.constexpr = 1 if BACKWARD else 2
    max_rows = max_input_rows, max_tape_rows
    middle, end = _segments(bounds_ptr, rows, max_rows)
    input_tiles = _num_tiles(max_rows[0], widths[0], BLOCK_M, BLOCK_N)
    tiles = input_tiles + _num_tiles(max_rows[1], gates * widths[1], BLOCK_M, BLOCK_N)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tape = number >= input_tiles
        tile = number - tl.where(tape, input_tiles, 0)
        first, used = tl.where(tape, middle, 0), tl.where(tape, end - middle, middle)
        own_rows, width = _of(tape, max_rows), _of(tape, widths)
        columns = width * tl.where(tape, gates, 1)
        row, column = _place(tile, own_rows, columns, BLOCK_M, BLOCK_N)

        offs_m, offs_n = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        offs_k, mask_n = tl.arange(0, BLOCK_K), offs_n < columns
        if BACKWARD:
            stride_wk = width
            w_offsets = offs_k[:, None] * width + offs_n[None, :]
        else:
            stride_wk = 1
            # A GLU's columns alternate between a and g, so that each pair meets in one thread.
            offs_w = tl.where(tape, offs_n // 2 + offs_n % 2 * width, offs_n)
            w_offsets = offs_w.to(tl.int64)[None, :] * dim + offs_k[:, None]
        acc = _multiply(
            in_ptr + (first + row).to(tl.int64) * dim + (offs_m[:, None] * dim + offs_k[None, :]),
            _of(tape, w_ptrs) + w_offsets,
            1,
            stride_wk,
            tl.where(row < used, dim, 0),
            offs_m < used - row,
            mask_n,
        )
        if BACKWARD:
            tensors = hidden_ptrs, dhidden_ptrs, act_ptrs, b_ptrs
            if tape:
                _store_bwd(acc, *tensors, row, column, used, width, ACTIVATION, TAPE=1)
            else:
                _store_bwd(acc, *tensors, row, column, used, width, ACTIVATION, TAPE=0)
        else:
            acc += tl.load(_of(tape, b_ptrs) + offs_w, mask_n, other=0.0).to(tl.float32)
            outputs = hidden_ptrs, act_ptrs
            if tape:
                _store_fwd(acc, *outputs, row, column, used, own_rows, width, ACTIVATION, TAPE=1)
            else:
                _store_fwd(acc, *outputs, row, column, used, own_rows, width, ACTIVATION, TAPE=0)


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
    middle, end = _segments(bounds_ptr, rows, max_rows)
    # The last kind's tiles cover the unused rows too.
    input_rows = tl.where(max_rows[1] > 0, middle, rows)
    input_tiles = _num_tiles(input_rows, dim, BLOCK_M, BLOCK_N)
    tiles = input_tiles + _num_tiles(rows - input_rows, dim, BLOCK_M, BLOCK_N)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tape = number >= input_tiles
        first, used = tl.where(tape, middle, 0), tl.where(tape, end - middle, middle)
        tile_rows = tl.where(tape, rows - input_rows, input_rows)
        tile = number - tl.where(tape, input_tiles, 0)
        row, column = _place(tile, tile_rows, dim, BLOCK_M, BLOCK_N)

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
        acc = _multiply(
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
    middle, end = _segments(bounds_ptr, rows, max_rows)
    if SECOND:
        input_tiles = _num_tiles(dim, columns[0], BLOCK_M, BLOCK_N)
        tape_tiles = _num_tiles(dim, columns[1], BLOCK_M, BLOCK_N)
    else:
        input_tiles = _num_tiles(columns[0], dim, BLOCK_M, BLOCK_N)
        tape_tiles = _num_tiles(columns[1], dim, BLOCK_M, BLOCK_N)
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

        row, column = _place(part % tiles, size_m, size_n, BLOCK_M, BLOCK_N)
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, BLOCK_K)
        mask_m, mask_n = offs_m < size_m, offs_n < size_n
        acc = _multiply(
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
    middle, end = _segments(bounds_ptr, rows, max_rows)
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
