"""The gradient of `compact_rows` in Triton: a copy back, and zero where a row left.

Each row looks for itself in the source, which ascends, so that one launch writes every row once.
"""

from torch import Tensor

from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    elements_per_access,
    with_dense_rows,
)

BLOCK_R, BLOCK_D = 8, 256


@compiled_for(aligned=("dpacked_ptr", "ddata_ptr"))
def _compact_rows_bwd_kernel(
    dpacked_ptr,
    source_ptr,
    ddata_ptr,
    stride_pm,
    num_packed,
    num_rows,
    dim,
    halvings,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block of rows, each of which has found its place by halving what is left."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = tl.zeros((BLOCK_R,), tl.int32)
    high = low + num_packed
    # The place is the number of sources below the row; the unused ones, of -1, are above all rows.
    for _ in range(halvings):
        middle = low + (high - low) // 2
        source = tl.load(source_ptr + middle, middle < high, other=-1)
        below = (source >= 0) & (source < offs_r)
        low = tl.where(below & (middle < high), middle + 1, low)
        high = tl.where(below, high, middle)
    kept = tl.load(source_ptr + low, low < num_packed, other=-1) == offs_r
    mask_r = offs_r < num_rows
    from_rows = tl.multiple_of(low.to(tl.int64) * stride_pm, VECTOR)
    to_rows = tl.multiple_of(offs_r.to(tl.int64) * dim, VECTOR)
    for d in range(0, dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = tl.max_constancy(offs_d < dim, VECTOR)
        exists = (mask_r & kept)[:, None] & mask_d
        values = tl.load(dpacked_ptr + from_rows[:, None] + offs_d, exists, other=0.0)
        tl.store(ddata_ptr + to_rows[:, None] + offs_d, values, mask_r[:, None] & mask_d)


@kernel()
def compact_rows_bwd(dpacked: Tensor, source: Tensor, rows: int) -> Tensor:
    """Launch the kernel."""
    num_packed, dim = dpacked.shape
    ddata = dpacked.new_empty(rows, dim)
    dpacked = with_dense_rows(dpacked)
    launch(
        _compact_rows_bwd_kernel,
        (num_blocks(rows, BLOCK_R),),
        dpacked_ptr=dpacked,
        source_ptr=source.contiguous(),
        ddata_ptr=ddata,
        stride_pm=dpacked.stride(0),
        num_packed=num_packed,
        num_rows=rows,
        dim=dim,
        halvings=num_packed.bit_length(),
        VECTOR=elements_per_access(dpacked),
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return ddata
