"""The form "grouped" of `dual_ffn`: both kinds of rows in one persistent launch a product.

hidden = x · w1ᵀ + b1,  act = act(hidden)        y = act · w2ᵀ + b2
dhidden = act'(hidden) ⊙ (dy · w2)               dx = dhidden · w1
dw1 = dhiddenᵀ · x,  dw2 = dyᵀ · act

Rows of x, y and their gradients are the buffer's: inputs up to `middle`, tape from there up to
`end`, which may stand on the device. All else comes in pairs, the input rows' and the tape rows',
where each kind's rows count from 0.
"""

import torch
from torch import Tensor

from adatape_kernels._triton import launch, tl, triton

CHUNK = 128
"""Rows whose sum, or whose part of a weight's gradient, one program may keep to itself."""


@triton.jit
def gelu(h):
    """Return h / 2 · (1 + tanh(u)) as h · sigmoid(2u), without an exponential that overflows."""
    return h * tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * h * h))


@triton.jit
def gelu_bwd(h, dact):
    """Return the gradient of h, and the activation once more."""
    square = h * h
    s = tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * square))
    slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * square)
    return dact * slope, h * s


@triton.jit
def glu_bwd(a, g, dact):
    """Return the gradients of a and g, and the activation once more."""
    s = tl.sigmoid(g)
    return dact * s, dact * a * s * (1 - s), a * s


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
def _store_fwd(acc, hidden_ptrs, act_ptrs, row, column, used, rows, width, TAPE: tl.constexpr):
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
            act = h.to(tl.float32) * tl.sigmoid(g.to(tl.float32))
        else:
            h = parts[quarter]
            act = gelu(h.to(tl.float32))
        tl.store(h_ptrs, h, exists & mask_n)
        tl.store(act_tile_ptr + offs_m * width + offs_n, act.to(dtype), mask_m & mask_n)


@triton.jit
def _store_bwd(
    dact, hidden_ptrs, dhidden_ptrs, act_ptrs, db_ptrs, row, column, used, width, TAPE: tl.constexpr
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
            dh, act = gelu_bwd(h, parts[quarter])
        tl.store(dhidden_ptrs[TAPE] + offsets, dh.to(dtype), mask)
        tl.store(db_ptr + offs_n, tl.sum(tl.where(mask, dh, 0.0), 0), mask_n)
        tl.store(act_ptrs[TAPE] + base + (offs_m * width + offs_n), act.to(dtype), mask)


@triton.jit
def _dual_ffn_up_kernel(
    in_ptr,
    w_ptrs,
    b_ptrs,  # b1; where BACKWARD the parts of its gradient, a row for each row of tiles
    hidden_ptrs,
    dhidden_ptrs,
    act_ptrs,
    bounds_ptr,
    rows,
    max_rows,
    dim,
    widths,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Get hidden and act from x; where BACKWARD, dhidden, act and db1 from dy."""
    gates: tl.constexpr = 1 if BACKWARD else 2
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
                _store_bwd(acc, *tensors, row, column, used, width, TAPE=1)
            else:
                _store_bwd(acc, *tensors, row, column, used, width, TAPE=0)
        else:
            acc += tl.load(_of(tape, b_ptrs) + offs_w, mask_n, other=0.0).to(tl.float32)
            if tape:
                _store_fwd(acc, hidden_ptrs, act_ptrs, row, column, used, own_rows, width, TAPE=1)
            else:
                _store_fwd(acc, hidden_ptrs, act_ptrs, row, column, used, own_rows, width, TAPE=0)


@triton.jit
def _dual_ffn_down_kernel(
    out_ptr,
    a_ptrs,
    w_ptrs,
    b_ptrs,
    bounds_ptr,
    rows,
    max_rows,
    dim,
    depths,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """y = act · w2ᵀ + b2, or dx = dhidden · w1 where BACKWARD; zero in unused rows."""
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


@triton.jit
def _dual_ffn_weight_kernel(
    row_ptr,
    own_ptrs,
    out_ptrs,
    bounds_ptr,
    rows,
    max_rows,
    dim,
    columns,
    splits,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SECOND: tl.constexpr,
):
    """dw1 = dhiddenᵀ · x, or dw2 = dyᵀ · act where SECOND; each split over `chunk` rows."""
    middle, end = _segments(bounds_ptr, rows, max_rows)
    if SECOND:
        input_tiles = _num_tiles(dim, columns[0], BLOCK_M, BLOCK_N)
        tape_tiles = _num_tiles(dim, columns[1], BLOCK_M, BLOCK_N)
    else:
        input_tiles = _num_tiles(columns[0], dim, BLOCK_M, BLOCK_N)
        tape_tiles = _num_tiles(columns[1], dim, BLOCK_M, BLOCK_N)
    input_parts = splits[0] * input_tiles
    parts = input_parts + splits[1] * tape_tiles
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


@triton.jit
def _dual_ffn_row_sums_kernel(
    dy_ptr,
    sums_ptr,
    bounds_ptr,
    rows,
    max_rows,
    dim,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over CHUNK rows of dy, those of each kind apart: (2, programs, dim)."""
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


def _tiles(x: Tensor, w2: tuple[Tensor, Tensor]) -> dict[str, int]:
    """Return the shape of the products' tiles, by dtype and by whether 16 divides all widths.

    Otherwise each element of a row is read by itself, and wide tiles would spill registers.
    """
    divided = all(size % 16 == 0 for w in w2 for size in w.shape)
    if x.dtype == torch.float32:
        num_warps = 4 if divided else 8
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=num_warps, num_stages=3)
    if divided:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)


def _num_programs(device: torch.device) -> int:
    """Return how many programs walk the tiles: one a multiprocessor, which their tiles fill."""
    if device.type != "cuda":
        return 4  # the interpreter: each then walks several tiles, as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the two products; returns y and both pre-activations."""
    x, (w1, b1, w2, b2) = x.contiguous(), _pairs(parameters)
    y, max_rows = x.new_empty(x.shape), (max_input_rows, max_tape_rows)
    hidden = x.new_empty(max_input_rows, len(w1[0]))
    tape_hidden = x.new_empty(max_tape_rows, len(w1[1]))
    hiddens = (hidden, tape_hidden)
    act = tuple(w.new_empty(n, w.shape[1]) for n, w in zip(max_rows, w2, strict=True))
    widths = tuple(a.shape[1] for a in act)
    sizes = bounds, len(x), max_rows, x.shape[1]
    options: dict = dict(**_tiles(x, w2), BACKWARD=False)
    grid = (_num_programs(x.device),)
    launch(_dual_ffn_up_kernel, grid, x, w1, b1, hiddens, None, act, *sizes, widths, **options)
    launch(_dual_ffn_down_kernel, grid, y, act, w2, b2, *sizes, widths, **options)
    return y, hidden, tape_hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """Launch the four products; returns the gradients of x and of the parameters."""
    dy, x, (w1, _, w2, _) = dy.contiguous(), x.contiguous(), _pairs(parameters)
    hiddens, max_rows = (hidden, tape_hidden), (len(hidden), len(tape_hidden))
    act = tuple(w.new_empty(n, w.shape[1]) for n, w in zip(max_rows, w2, strict=True))
    dx, dhidden = x.new_empty(x.shape), tuple(h.new_empty(h.shape) for h in hiddens)
    tiles = _tiles(x, w2)
    options: dict = dict(**tiles, BACKWARD=True)
    db1 = tuple(  # one row for each row of tiles
        h.new_empty(triton.cdiv(len(h), tiles["BLOCK_M"]), h.shape[1], dtype=torch.float32)
        for h in hiddens
    )
    columns, widths = (tuple(t.shape[1] for t in pair) for pair in (hiddens, act))
    sizes = bounds, len(x), max_rows, x.shape[1]
    grid = (_num_programs(x.device),)
    launch(_dual_ffn_up_kernel, grid, dy, w2, db1, hiddens, dhidden, act, *sizes, widths, **options)
    launch(_dual_ffn_down_kernel, grid, dx, dhidden, w1, None, *sizes, columns, **options)
    dw1 = _weight_gradients(x, dhidden, sizes, tiles, SECOND=False)
    dw2 = _weight_gradients(dy, act, sizes, tiles, SECOND=True)
    db2 = _row_sums(dy, sizes)
    dinput, dtape = zip(dw1, (db.sum(0).to(x.dtype) for db in db1), dw2, db2, strict=True)
    absent = (x.new_empty(0) for _ in dtape)
    return dx, *dinput, *(absent if parameters[4] is None else dtape)


def _weight_gradients(
    rows: Tensor, own: tuple[Tensor, ...], sizes: tuple, tiles: dict[str, int], SECOND: bool
) -> list[Tensor]:
    """Return both kinds' sum of outer products of `rows`, x or dy, with what is their `own`."""
    programs = _num_programs(rows.device)
    columns = tuple(t.shape[1] for t in own)
    shapes = [(rows.shape[1], c) if SECOND else (c, rows.shape[1]) for c in columns]
    num_tiles = [
        triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]) for m, n in shapes
    ]
    chunk = _rows_of_a_split([len(t) for t in own], num_tiles, programs)
    splits = tuple(max(1, triton.cdiv(len(t), chunk)) for t in own)
    dtype = rows.dtype if splits == (1, 1) else torch.float32
    out = tuple(rows.new_empty(n, *s, dtype=dtype) for n, s in zip(splits, shapes, strict=True))
    args = rows, own, out, *sizes, columns, splits, chunk
    launch(_dual_ffn_weight_kernel, (programs,), *args, SECOND=SECOND, **tiles)
    return [t[0] if splits == (1, 1) else t.sum(0).to(rows.dtype) for t in out]


def _rows_of_a_split(rows: list[int], num_tiles: list[int], programs: int) -> int:
    """Return so many that each program has at most one tile of one split, if that can be."""
    (longest, most), (other, few) = sorted(zip(rows, num_tiles, strict=True), reverse=True)
    splits = (programs - few) * longest // max(1, most * longest + few * other)
    return max(1, triton.cdiv(triton.cdiv(longest, max(1, splits)), CHUNK)) * CHUNK


def _row_sums(dy: Tensor, sizes: tuple) -> list[Tensor]:
    """Return the sums of dy over the rows of each kind."""
    rows, dim = dy.shape
    sums = dy.new_empty(2, triton.cdiv(rows, CHUNK), dim, dtype=torch.float32)
    grid = (sums.shape[1], triton.cdiv(dim, 64))
    tile = dict(CHUNK=CHUNK, BLOCK_M=32, BLOCK_N=64, num_warps=4)
    launch(_dual_ffn_row_sums_kernel, grid, dy, sums, *sizes, **tile)
    return [s.sum(0).to(dy.dtype) for s in sums]


def _pairs(parameters: tuple[Tensor | None, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return w1, b1, w2 and b2 of both kinds; of no width where there is no tape feed-forward."""
    w1, b1, w2, b2, *tape_ffn = (p.contiguous() for p in parameters if p is not None)
    return list(zip((w1, b1, w2, b2), tape_ffn or (w1[:0], b1[:0], w2[:, :0], b2), strict=True))
