"""How the persistent kernels of `dual_ffn` walk the tiles of both kinds of rows."""

from adatape_kernels.ops.triton_runtime import tl, triton


@triton.jit
def segments(bounds_ptr, rows, max_rows, SLICED: tl.constexpr):
    """Return where input rows and tape rows end: inside the tensors, whatever the device says.

    SLICED says that the host has cut the rows at max_rows[0], and only the end is the device's.
    """
    middle, end = max_rows[0], max_rows[0] + max_rows[1]
    if bounds_ptr is not None and SLICED:
        least = tl.where(max_rows[1] > 0, middle, 0)
        end = tl.minimum(tl.maximum(tl.load(bounds_ptr + 1), least), end).to(tl.int32)
        middle = tl.minimum(middle, end)
    elif bounds_ptr is not None:
        middle = tl.minimum(tl.maximum(tl.load(bounds_ptr), 0), max_rows[0]).to(tl.int32)
        last = tl.minimum(middle + max_rows[1], rows)
        end = tl.minimum(tl.maximum(tl.load(bounds_ptr + 1), middle), last).to(tl.int32)
    return middle, end


@triton.jit
def num_tiles(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return how many tiles cover a matrix."""
    return tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)


@triton.jit
def place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile's first row and column; eight rows of tiles at a time share the L2 cache."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tile // (8 * column_tiles) * 8
    height = tl.minimum(row_tiles - first, 8)
    within = tile % (8 * column_tiles)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def multiply(
    a_ptrs,  # (BLOCK_M, BLOCK_K)
    b_ptrs,  # (BLOCK_K, BLOCK_N)
    stride_ak,
    stride_bk,
    depth,
    mask_m,
    mask_n,
):
    """Return a tile of a product in float32; rows and columns outside the masks are zero."""
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
def halves(x):
    """Return the left and the right half of a tile."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (m, 2, n // 2)), (0, 2, 1)))
