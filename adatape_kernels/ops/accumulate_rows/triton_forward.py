"""`accumulate_rows` in Triton: one launch in place, and three for a sum of its own.

The sum of its own is written in one pass over the total, which asks of each of its rows which row
is added to it. Of the three launches the first two fill in those answers, 4 bytes a row. To copy
the total and then add in place would take two launches, and move the rows that are added to twice.
"""

from typing import Any

from torch import Tensor

from adatape_kernels.ops.accumulate_rows.triton_primitives import BLOCK_D, BLOCK_R, why_not
from adatape_kernels.ops.device_facts import facts_of
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    elements_per_access,
    with_dense_rows,
)

BLOCK = 1024
"""Rows that a program notes in the total's."""


@compiled_for()
def _accumulate_rows_places_kernel(
    source_ptr, row_of_ptr, num_rows, num_total, BLOCK: tl.constexpr
):
    """Note for each row of the total the row that is added to it; -1 is there for the others."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source_ptr + row, row < num_rows, other=-1)
    tl.store(row_of_ptr + place, row, (place >= 0) & (place < num_total))


@compiled_for(aligned=("total_ptr", "rows_ptr", "sum_ptr"))
def _accumulate_rows_fwd_kernel(
    total_ptr,
    rows_ptr,
    other_ptr,
    weights_ptr,
    total_weights_ptr,
    sum_ptr,
    stride_tm,
    stride_rm,
    stride_sm,
    num_total,
    num_rows,
    dim,
    IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add a block of rows. In place it is one of `rows`, else one of the total.

    `other_ptr` names the other row of each pair: in place the source, else the row that is added to
    a row of the total.
    """
    one = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = one < (num_rows if IN_PLACE else num_total)
    other = tl.load(other_ptr + one, mask_r, other=-1)
    added = (other >= 0) & (other < (num_total if IN_PLACE else num_rows))
    place = (other if IN_PLACE else one).to(tl.int64)
    row = (one if IN_PLACE else other).to(tl.int64)
    written = added if IN_PLACE else mask_r
    weight = tl.load(weights_ptr + row, added, other=0.0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < dim, VECTOR)
    total_rows = tl.multiple_of(place * stride_tm, VECTOR)
    added_rows = tl.multiple_of(row * stride_rm, VECTOR)
    sum_rows = tl.multiple_of(place * stride_sm, VECTOR)
    whole = written[:, None] & mask_d
    before = tl.load(total_ptr + total_rows[:, None] + offs_d, whole, other=0.0)
    value = tl.load(rows_ptr + added_rows[:, None] + offs_d, added[:, None] & mask_d, other=0.0)
    after = before.to(tl.float32)
    if total_weights_ptr is not None:
        after *= tl.load(total_weights_ptr + row, added, other=1.0)[:, None]
    after += weight[:, None] * value.to(tl.float32)
    after = tl.where(added[:, None], after.to(sum_ptr.dtype.element_ty), before)
    tl.store(sum_ptr + sum_rows[:, None] + offs_d, after, whole)


def _registers(total: Tensor, vector: int) -> dict[str, int]:
    """Return a bound on a thread's registers where ptxas has to be told that there are so many.

    For 10.0 it spills two of 32 so that 16 blocks fit a multiprocessor; 12 fit of 40. Narrow
    accesses need more registers, which it gives them unasked.

    Args:
        total: what is added to.
        vector: number of elements of an access.
    """
    wide = vector > 1 and total.element_size() == 2
    return {"maxnreg": 40} if wide and facts_of(total.device).capability >= (10, 0) else {}


def _limits(device: Any, total: Tensor, rows: Tensor, *rest: Any) -> str | None:
    return why_not(rows)


def _launch(
    total: Tensor,
    rows: Tensor,
    other: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
    sums: Tensor,
) -> None:
    """Launch the kernel that adds; in place where the sums are the total."""
    in_place, rows = sums is total, with_dense_rows(rows)
    vector = min(elements_per_access(total), elements_per_access(rows))
    (num_total, dim), num_rows = total.shape, rows.shape[0]
    launch(
        _accumulate_rows_fwd_kernel,
        (num_blocks(num_rows if in_place else num_total, BLOCK_R), num_blocks(dim, BLOCK_D)),
        total_ptr=total,
        rows_ptr=rows,
        other_ptr=other,
        weights_ptr=weights.contiguous(),
        total_weights_ptr=None if total_weights is None else total_weights.contiguous(),
        sum_ptr=sums,
        stride_tm=total.stride(0),
        stride_rm=rows.stride(0),
        stride_sm=sums.stride(0),
        num_total=num_total,
        num_rows=num_rows,
        dim=dim,
        IN_PLACE=in_place,
        VECTOR=vector,
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
        num_warps=4,
        **_registers(total, vector),
    )


@kernel(_limits)
def accumulate_rows(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> Tensor:
    """Launch the kernels."""
    sums = total.new_empty(*total.shape)
    row_of = source.new_full(total.shape[:1], -1)
    launch(
        _accumulate_rows_places_kernel,
        (num_blocks(len(source), BLOCK),),
        source_ptr=source.contiguous(),
        row_of_ptr=row_of,
        num_rows=len(source),
        num_total=len(total),
        BLOCK=BLOCK,
        num_warps=4,
    )
    _launch(with_dense_rows(total), rows, row_of, weights, total_weights, sums)
    return sums


@kernel(_limits)
def accumulate_rows_(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> None:
    """Launch the kernel, on a copy of a total whose rows it cannot write by whole accesses."""
    held = with_dense_rows(total)
    _launch(held, rows, source.contiguous(), weights, total_weights, held)
    if held is not total:
        total.copy_(held)
