"""The first product of `dual_ffn` with what follows it, for both kinds of rows and both directions.

Forward, a tile of x · w1ᵀ gets its bias and leaves as pre-activations and activations. Backward, a
tile of dy · w2 meets the pre-activations and leaves as their gradient and as activations, with the
sums that make the bias's gradient.

On GPUs with tensor descriptors the tensor memory accelerator brings the operands, without registers
for addresses. Two blocks fit a multiprocessor then, so that one multiplies while the other stores.
"""

from adatape_kernels.ops.dual_ffn.triton_primitives import activate, activate_bwd, glu_bwd, sigmoid
from adatape_kernels.ops.dual_ffn.triton_tiles import halves, multiply, num_tiles, place, segments
from adatape_kernels.ops.triton_runtime import tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for


@triton.jit
def _store_fwd(
    acc,  # (BLOCK_M, BLOCK_N); of a GLU the left half is a, the right half g
    hidden_ptr,
    act_ptr,
    b_ptr,
    row,
    column,
    used,
    rows,
    width,
    ACTIVATION: tl.constexpr,
):
    """Store a tile of hidden, zero in unused rows, and its activation in used ones."""
    size: tl.constexpr = acc.shape[1] // 2
    columns = 2 * width if ACTIVATION == "glu" else width
    dtype = act_ptr.dtype.element_ty
    offs_m, offs_n = tl.arange(0, acc.shape[0])[:, None], column + tl.arange(0, size)
    exists, mask_m = offs_m < rows - row, offs_m < used - row
    hidden_ptr += row.to(tl.int64) * columns
    act_ptr += row.to(tl.int64) * width
    left, right = halves(acc)
    # The activation is that of hidden as rounded: what the backward differentiates.
    if ACTIVATION == "glu":
        mask_n = offs_n < width
        h_ptrs = hidden_ptr + offs_m * columns + offs_n
        h = (left + tl.load(b_ptr + offs_n, mask_n, other=0.0).to(tl.float32)).to(dtype)
        tl.store(h_ptrs, tl.where(mask_m, h, 0.0), exists & mask_n)
        g = (right + tl.load(b_ptr + width + offs_n, mask_n, other=0.0).to(tl.float32)).to(dtype)
        tl.store(h_ptrs + width, tl.where(mask_m, g, 0.0), exists & mask_n)
        act = h.to(tl.float32) * sigmoid(g.to(tl.float32))
        tl.store(act_ptr + offs_m * width + offs_n, act.to(dtype), mask_m & mask_n)
    else:
        for half in tl.static_range(2):
            mask_n = offs_n < width
            h = left if half == 0 else right
            h = (h + tl.load(b_ptr + offs_n, mask_n, other=0.0).to(tl.float32)).to(dtype)
            h_ptrs = hidden_ptr + offs_m * columns + offs_n
            tl.store(h_ptrs, tl.where(mask_m, h, 0.0), exists & mask_n)
            act = activate(h.to(tl.float32), ACTIVATION)
            tl.store(act_ptr + offs_m * width + offs_n, act.to(dtype), mask_m & mask_n)
            offs_n += size


@triton.jit
def _store_bwd(
    dact,
    dhidden_ptr,
    act_ptr,
    db_ptr,
    hidden_ptr,
    row,
    column,
    used,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    SLICED: tl.constexpr,
):
    """Store a tile of dhidden and of the activation, and dhidden's sums over the tile's rows."""
    size: tl.constexpr = dact.shape[1] // 4
    columns = 2 * width if ACTIVATION == "glu" else width
    dtype = act_ptr.dtype.element_ty
    offs_m, offs_n = tl.arange(0, dact.shape[0])[:, None], column + tl.arange(0, size)
    mask_m = offs_m < used - row
    stored_m = offs_m < rows - row if SLICED else mask_m
    base = row.to(tl.int64)
    hidden_ptr += base * columns
    dhidden_ptr += base * columns
    act_ptr += base * width
    db_ptr += base // dact.shape[0] * columns
    left, right = halves(tl.where(mask_m, dact, 0.0))
    first, second = halves(left)
    third, fourth = halves(right)
    parts = first, second, third, fourth
    for quarter in tl.static_range(4):
        mask_n = offs_n < width
        mask, stored = mask_m & mask_n, stored_m & mask_n
        offsets = offs_m * columns + offs_n
        h = tl.load(hidden_ptr + offsets, mask, other=0.0).to(tl.float32)
        if ACTIVATION == "glu":
            g = tl.load(hidden_ptr + offsets + width, mask, other=0.0).to(tl.float32)
            dh, dg, act = glu_bwd(h, g, parts[quarter])
            tl.store(dhidden_ptr + offsets + width, dg.to(dtype), stored)
            tl.store(db_ptr + width + offs_n, tl.sum(dg, 0), mask_n)
        else:
            dh, act = activate_bwd(h, parts[quarter], ACTIVATION)
        tl.store(dhidden_ptr + offsets, dh.to(dtype), stored)
        tl.store(db_ptr + offs_n, tl.sum(dh, 0), mask_n)
        tl.store(act_ptr + (offs_m * width + offs_n), act.to(dtype), stored)
        offs_n += size


@triton.jit
def _clear(ptr, first_row, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write zeros to the rows of a matrix from first_row on."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N), ptr.dtype.element_ty)
    tiles = num_tiles(rows - first_row, columns, BLOCK_M, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column = place(tile, rows - first_row, columns, BLOCK_M, BLOCK_N)
        offs_m = (first_row + row + tl.arange(0, BLOCK_M)).to(tl.int64)
        offs_n = column + tl.arange(0, BLOCK_N)
        mask = (offs_m < rows)[:, None] & (offs_n < columns)
        tl.store(ptr + offs_m[:, None] * columns + offs_n, zeros, mask)


@triton.jit
def _clear_unused(
    b_ptrs,
    hidden_ptrs,
    dhidden_ptrs,
    act_ptrs,
    used,
    rows,
    width,
    TAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLICED: tl.constexpr,
):
    """Write the zeros of those rows of tiles that have no row in use."""
    row_tiles = tl.cdiv(used, BLOCK_M)
    first, columns = row_tiles * BLOCK_M, 2 * width if TAPE else width
    if BACKWARD:
        _clear(b_ptrs[TAPE], row_tiles, tl.cdiv(rows, BLOCK_M), columns, 16, BLOCK_N)
        if SLICED:
            _clear(dhidden_ptrs[TAPE], first, rows, columns, BLOCK_M, BLOCK_N)
            _clear(act_ptrs[TAPE], first, rows, width, BLOCK_M, BLOCK_N)
    else:
        _clear(hidden_ptrs[TAPE], first, rows, columns, BLOCK_M, BLOCK_N)


@triton.jit
def _walk(
    in_ptr,
    w_ptrs,
    b_ptrs,
    hidden_ptrs,
    dhidden_ptrs,
    act_ptrs,
    in_desc,
    w_desc,
    tiles_before,  # of the other kind of rows, which the programs have walked
    first,  # row of the buffer
    used,
    rows,
    dim,
    width,
    TAPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLICED: tl.constexpr,
):
    """Do all of one kind of rows, which are `rows` rows in its own tensors, `used` of them used."""
    GATES: tl.constexpr = 2 if TAPE and not BACKWARD else 1
    COLUMNS: tl.constexpr = BLOCK_N // GATES  # of act in a tile
    DESCRIPTORS: tl.constexpr = in_desc is not None
    programs = tl.num_programs(0)
    start = (tl.program_id(0) + programs - tiles_before % programs) % programs
    tiles = num_tiles(used, width, BLOCK_M, COLUMNS)
    # "flatten" asks for the next tile's first operands while this tile is stored.
    for tile in tl.range(start, tiles, programs, flatten=DESCRIPTORS):
        row, column = place(tile, used, width, BLOCK_M, COLUMNS)
        if DESCRIPTORS:
            # Rows behind this kind's are multiplied too, and not stored.
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, dim, BLOCK_K):
                rows_in = in_desc.load([first + row, k])
                if BACKWARD:
                    acc = tl.dot(rows_in, w_desc.load([k, column]), acc)
                elif GATES == 2:
                    w = w_desc.load([0, column, k]).reshape(BLOCK_N, BLOCK_K)
                    acc = tl.dot(rows_in, w.T, acc)
                else:
                    acc = tl.dot(rows_in, w_desc.load([column, k]).T, acc)
        else:
            offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
            offs_k, offs_act = tl.arange(0, BLOCK_K), column + offs_n % COLUMNS
            if BACKWARD:
                stride_wk = width
                w_offsets = offs_k[:, None] * width + offs_act[None, :]
            else:
                stride_wk = 1
                offs_w = offs_act + offs_n // COLUMNS * width
                w_offsets = offs_w.to(tl.int64)[None, :] * dim + offs_k[:, None]
            in_offsets = offs_m[:, None] * dim + offs_k[None, :]
            acc = multiply(
                in_ptr + (first + row).to(tl.int64) * dim + in_offsets,
                w_ptrs[TAPE] + w_offsets,
                1,
                stride_wk,
                dim,
                offs_m < used - row,
                offs_act < width,
            )
        if BACKWARD:
            outputs = dhidden_ptrs[TAPE], act_ptrs[TAPE], b_ptrs[TAPE]
            given = hidden_ptrs[TAPE], row, column, used, rows, width
            _store_bwd(acc, *outputs, *given, ACTIVATION, SLICED)
        else:
            given = b_ptrs[TAPE], row, column, used, rows, width
            _store_fwd(acc, hidden_ptrs[TAPE], act_ptrs[TAPE], *given, ACTIVATION)
    return tiles


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
    in_desc,  # of the same tensors as the pointers, or None
    w_desc,
    tape_w_desc,  # of w1 as (2, width, dim), or of w2; None also if there are no tape parameters
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
    INPUTS: tl.constexpr,  # whether this launch takes the input rows
    TAPES: tl.constexpr,  # and whether it takes the tape rows
    SLICED: tl.constexpr,  # whether torch takes the results in slices that the host has cut
):
    """Get hidden and act from x; where BACKWARD, dhidden, act and db1 from dy.

    Unused rows of hidden are zero and, where BACKWARD and SLICED, those of dhidden and act.
    """
    max_rows = max_input_rows, max_tape_rows
    middle, end = segments(bounds_ptr, rows, max_rows, SLICED)
    input_tiles = 0
    if INPUTS:
        input_tiles = _walk(
            in_ptr,
            w_ptrs,
            b_ptrs,
            hidden_ptrs,
            dhidden_ptrs,
            act_ptrs,
            in_desc,
            w_desc,
            0,
            0,
            middle,
            max_rows[0],
            dim,
            widths[0],
            0,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BACKWARD,
            SLICED,
        )
    if TAPES and (in_desc is None or tape_w_desc is not None):
        _walk(
            in_ptr,
            w_ptrs,
            b_ptrs,
            hidden_ptrs,
            dhidden_ptrs,
            act_ptrs,
            in_desc,
            tape_w_desc,
            input_tiles,
            middle,
            end - middle,
            max_rows[1],
            dim,
            widths[1],
            1,
            "glu",
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BACKWARD,
            SLICED,
        )
    if bounds_ptr is not None:
        for tape in tl.static_range(0 if INPUTS else 1, 2 if TAPES else 1):
            _clear_unused(
                b_ptrs,
                hidden_ptrs,
                dhidden_ptrs,
                act_ptrs,
                end - middle if tape else middle,
                max_rows[tape],
                widths[tape],
                tape,
                BLOCK_M,
                BLOCK_N,
                BACKWARD,
                SLICED,
            )
