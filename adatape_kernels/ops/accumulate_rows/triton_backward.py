"""The gradients of `accumulate_rows` in Triton: one launch over the rows that were added.

Where the total's gradient is one of its own, it begins as a copy, and the launch writes the rows
that something was added to.
"""

from typing import Any

from torch import Tensor

from adatape_kernels.ops.accumulate_rows.triton_primitives import BLOCK_D, BLOCK_R, why_not
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    elements_per_access,
    with_dense_rows,
)


@compiled_for(aligned=("dsum_ptr", "total_ptr", "rows_ptr", "dtotal_ptr", "drows_ptr"))
def _accumulate_rows_bwd_kernel(
    dsum_ptr,
    total_ptr,
    rows_ptr,
    source_ptr,
    weights_ptr,
    total_weights_ptr,
    dtotal_ptr,
    drows_ptr,
    dweights_ptr,
    dtotal_weights_ptr,
    stride_sm,
    stride_tm,
    stride_rm,
    num_total,
    num_rows,
    dim,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradients of a block of rows, of their factors, and of the rows of the total."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = row < num_rows
    place = tl.load(source_ptr + row, mask_r, other=-1)
    added = (place >= 0) & (place < num_total)
    weight = tl.load(weights_ptr + row, added, other=0.0)[:, None]
    dweight = tl.zeros((BLOCK_R,), tl.float32)
    dtotal_weight = tl.zeros((BLOCK_R,), tl.float32)
    sum_rows = tl.multiple_of(place.to(tl.int64) * stride_sm, VECTOR)
    total_rows = tl.multiple_of(place.to(tl.int64) * stride_tm, VECTOR)
    dtotal_rows = tl.multiple_of(place.to(tl.int64) * dim, VECTOR)
    added_rows = tl.multiple_of(row.to(tl.int64) * stride_rm, VECTOR)
    drows = tl.multiple_of(row.to(tl.int64) * dim, VECTOR)
    for d in range(0, dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = tl.max_constancy(offs_d < dim, VECTOR)
        exists = added[:, None] & mask_d
        given = tl.load(dsum_ptr + sum_rows[:, None] + offs_d, exists, other=0.0).to(tl.float32)
        value = tl.load(rows_ptr + added_rows[:, None] + offs_d, exists, other=0.0)
        dweight += tl.sum(value.to(tl.float32) * given, 1)
        drow = tl.where(exists, weight * given, 0.0).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + drows[:, None] + offs_d, drow, mask_r[:, None] & mask_d)
        if total_weights_ptr is not None:
            total_weight = tl.load(total_weights_ptr + row, added, other=0.0)[:, None]
            before = tl.load(total_ptr + total_rows[:, None] + offs_d, exists, other=0.0)
            dtotal_weight += tl.sum(before.to(tl.float32) * given, 1)
            dbefore = (total_weight * given).to(dtotal_ptr.dtype.element_ty)
            tl.store(dtotal_ptr + dtotal_rows[:, None] + offs_d, dbefore, exists)
    tl.store(dweights_ptr + row, dweight, mask_r)
    if total_weights_ptr is not None:
        tl.store(dtotal_weights_ptr + row, dtotal_weight, mask_r)


def _limits(
    device: Any, dsum: Tensor, total: Tensor | None, rows: Tensor, *rest: Any
) -> str | None:
    return why_not(rows)


@kernel(_limits)
def accumulate_rows_bwd(
    dsum: Tensor,
    total: Tensor | None,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel."""
    dsum, rows = with_dense_rows(dsum), with_dense_rows(rows)
    num_rows, dim = rows.shape
    drows, dweights = rows.new_empty(*rows.shape), weights.new_empty(*weights.shape)
    dtotal, dtotal_weights = dsum.new_empty(0, dim), weights.new_empty(0)
    if total is not None and total_weights is not None:
        total, total_weights = with_dense_rows(total), total_weights.contiguous()
        dtotal = dsum.new_empty(*dsum.shape).copy_(dsum)
        dtotal_weights = weights.new_empty(*weights.shape)
    else:
        total = total_weights = None
    launch(
        _accumulate_rows_bwd_kernel,
        (num_blocks(num_rows, BLOCK_R),),
        dsum_ptr=dsum,
        total_ptr=total,
        rows_ptr=rows,
        source_ptr=source.contiguous(),
        weights_ptr=weights.contiguous(),
        total_weights_ptr=total_weights,
        dtotal_ptr=dtotal,
        drows_ptr=drows,
        dweights_ptr=dweights,
        dtotal_weights_ptr=dtotal_weights,
        stride_sm=dsum.stride(0),
        stride_tm=0 if total is None else total.stride(0),
        stride_rm=rows.stride(0),
        num_total=dsum.shape[0],
        num_rows=num_rows,
        dim=dim,
        VECTOR=min(elements_per_access(dsum), elements_per_access(rows)),
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return dtotal, drows, dweights, dtotal_weights
