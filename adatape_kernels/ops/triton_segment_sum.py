"""Sum weighted rows into the bank entries that they belong to: a gather's gradient.

out[m] = Σ_p weights[p] · rows[row_of[p]]   over the contributions p with entries[p] = m

The contributions to one bank entry are its segment. The backwards of `tape_select`, `tape_gather`
and `tape_read` end in this sum, which is no op of its own.
"""

import torch
from torch import Tensor

from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_segments import (
    SegmentOrder,
    segments_in_any_order,
    segments_in_order,
)
from adatape_kernels.ops.triton_specialization import compiled_for, elements_per_access

# In a bank of an example's own, the contributions that a program looks at together; in a segment of
# a shared bank, those that it adds up together. Most segments are short, and have a warp each.
_BLOCK_N, _BLOCK_SEGMENT = 8, 4
# A segment of a shared bank is added up in parts of so many contributions, a warp each. A block of
# contributions waits for memory three times in a row: for the order, its rows' numbers, its rows.
# Where each of 256 examples reads an entry, a warp that adds up the segment alone waits 64 · 3
# times; a part waits 4 · 3 times, and the sum of the parts 5 times. The number is a constant, so
# that the order of a sum depends on nothing but its contributions.
_PART = 16
# Partial sums that a program adds up together.
_BLOCK_PARTS = 8
# Features of a program's block: a warp's lanes then move 16 bytes at a time. Of rows that are read
# element by element a lane would need an address and a mask for each of 32 elements of a shared
# bank's block, more registers than ptxas allots it.
_BLOCK_D, _BLOCK_D_BY_ELEMENT = 256, 128


def segment_sum(
    rows: Tensor,
    entries: Tensor,
    bank_size: int,
    dtype: torch.dtype,
    *,
    row_of: Tensor | None = None,
    weights: Tensor | None = None,
    leading: Tensor | None = None,
    ordered: bool = True,
) -> Tensor:
    """Sum weighted rows by bank entry, in float32.

    Args:
        rows: (num_rows, width), as `with_dense_rows` returns them; one that no entry takes is not
            read.
        entries: (n,) int32 for a shared bank, (batch, n) for banks of the examples' own; the entry
            of each contribution, bank_size where it has none; contiguous, as are the next two.
        bank_size: entries of a bank.
        dtype: of the result.
        row_of: int32, shaped as entries, the row of each contribution, negative for none; None for
            its own place among the entries, flattened.
        weights: as many float32 factors; None for 1.
        leading: for a shared bank, (n, up to width) float32, contiguous; what each contribution
            adds to the first features beside its weighted row; None for nothing.
        ordered: sum in a fixed order, so that equal input gives equal bits; False, for a shared
            bank, sums a segment in whatever order it was counted in, which spares sorting.

    Returns:
        ([batch,] bank_size, width), zero for entries without a contribution.
    """
    width = rows.shape[1]
    if entries.dim() == 1:
        make = segments_in_order if ordered else segments_in_any_order
        return _sum_segments(
            rows, entries, make(entries, bank_size), bank_size, dtype, row_of, weights, leading
        )
    batch, number = entries.shape
    out = rows.new_zeros(batch, bank_size, width, dtype=dtype)
    launch(
        _segment_sum_own_kernel,
        (batch * num_blocks(number, _BLOCK_N), num_blocks(width, _BLOCK_D)),
        rows_ptr=rows,
        entries_ptr=entries,
        row_of_ptr=row_of,
        weights_ptr=weights,
        out_ptr=out,
        stride_r=rows.stride(0),
        num_contributions=number,
        bank_size=bank_size,
        width=width,
        VECTOR=elements_per_access(rows),
        BLOCK_N=_BLOCK_N,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
    )
    return out


def _sum_segments(
    rows: Tensor,
    entries: Tensor,
    segments: SegmentOrder,
    bank_size: int,
    dtype: torch.dtype,
    row_of: Tensor | None,
    weights: Tensor | None,
    leading: Tensor | None,
) -> Tensor:
    """Sum the segments of a shared bank: short ones at once, long ones part by part.

    A launch sums every short segment and the parts of all others; where there can be long segments,
    another adds up the sums of their parts.
    """
    (_, width), (stride_r, _) = rows.shape, rows.stride()
    # As many parts behind the first one of their segment are there at most.
    further = max(entries.shape[0] - 1, 0) // _PART
    out = rows.new_empty(bank_size, width, dtype=dtype)
    partial = rows.new_empty(2, further + 1, width, dtype=torch.float32)
    lead_dim = 0 if leading is None else leading.shape[1]
    vector = elements_per_access(rows) if leading is None else elements_per_access(rows, leading)
    block_d = _BLOCK_D if vector > 1 else _BLOCK_D_BY_ELEMENT
    blocks = num_blocks(width, block_d)
    places = dict(
        partial_ptr=partial,
        out_ptr=out,
        entries_ptr=entries,
        order_ptr=segments.order,
        starts_ptr=segments.starts,
        bank_size=bank_size,
        further=further,
        width=width,
    )
    options = dict(PART=_PART, BLOCK_D=block_d, num_warps=1)
    launch(
        _segment_sum_shared_kernel,
        (bank_size + further, blocks),
        rows_ptr=rows,
        row_of_ptr=row_of,
        weights_ptr=weights,
        leading_ptr=leading,
        stride_r=stride_r,
        lead_dim=lead_dim,
        VECTOR=vector,
        BLOCK_N=_BLOCK_SEGMENT,
        **places,
        **options,
    )
    launch(
        _add_parts_kernel,
        (further, blocks),
        **places,
        VECTOR=elements_per_access(rows),
        BLOCK_N=_BLOCK_PARTS,
        **options,
    )
    return out


@compiled_for(aligned=("rows_ptr", "leading_ptr", "partial_ptr", "out_ptr"))
def _segment_sum_shared_kernel(
    rows_ptr,
    entries_ptr,
    order_ptr,
    starts_ptr,
    row_of_ptr,
    weights_ptr,
    leading_ptr,
    partial_ptr,
    out_ptr,
    bank_size,
    further,
    stride_r,
    width,
    lead_dim,
    VECTOR: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a part of the segment of one entry of a bank that examples share.

    The first programs sum the first part of an entry's segment each, the others a further one.
    """
    program = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < width, VECTOR)
    out_ptrs = out_ptr + tl.multiple_of(program.to(tl.int64) * width, VECTOR) + offs_d
    if program < bank_size:
        start = tl.load(starts_ptr + program)
        end = tl.load(starts_ptr + program + 1)
        slot = start // PART
        is_whole = end - start <= PART
    else:
        slot = program - bank_size + 1
        _, start, end = _further_part(entries_ptr, order_ptr, starts_ptr, bank_size, slot, PART)
        slot += further + 1
        is_whole = False
    total = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    for first in range(start, tl.minimum(end, start + PART), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < tl.minimum(end, start + PART)
        taken = tl.load(order_ptr + offs_n, mask_n, other=0)
        total += _contributions(
            rows_ptr, row_of_ptr, weights_ptr, taken, mask_n, offs_d, mask_d, stride_r, VECTOR
        )
        if leading_ptr is not None:
            mask = mask_n[:, None] & tl.max_constancy(offs_d < lead_dim, VECTOR)
            begin = tl.multiple_of(taken.to(tl.int64) * lead_dim, VECTOR)
            total += tl.load(leading_ptr + begin[:, None] + offs_d, mask, other=0.0)
    sum = tl.sum(total, 0)
    if is_whole:
        tl.store(out_ptrs, sum.to(out_ptr.dtype.element_ty), mask_d)
    elif start < end:
        partial_ptr += tl.multiple_of(slot.to(tl.int64) * width, VECTOR)
        tl.store(partial_ptr + offs_d, sum, mask_d)


@triton.jit
def _further_part(entries_ptr, order_ptr, starts_ptr, bank_size, slot, PART: tl.constexpr):
    """Return the entry, begin and end of the part that begins in slot `slot` of the order.

    A slot is PART places of the order. Further parts of one segment begin PART places apart; the
    first further part of the next segment begins more than PART behind the last one of this: so
    that no two begin in one slot. And the segment of such a part holds the slot's first place. The
    begin is the end where no further part begins in the slot.
    """
    place = slot * PART
    entry, start, end = 0, 0, 0
    if place < tl.load(starts_ptr + bank_size):
        entry = tl.load(entries_ptr + tl.load(order_ptr + place))
        start = tl.load(starts_ptr + entry)
        end = tl.load(starts_ptr + entry + 1)
        # A segment that begins at the place has its first part there.
        start = tl.where(start < place, start + (place - start + PART - 1) // PART * PART, end)
    return entry, tl.minimum(start, end), end


@compiled_for(aligned=("partial_ptr", "out_ptr"))
def _add_parts_kernel(
    entries_ptr,
    order_ptr,
    starts_ptr,
    partial_ptr,
    out_ptr,
    bank_size,
    further,
    width,
    VECTOR: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the sums of a segment's parts, in their order: the program of its second part does."""
    slot = tl.program_id(0) + 1
    entry, begin, end = _further_part(entries_ptr, order_ptr, starts_ptr, bank_size, slot, PART)
    start = tl.load(starts_ptr + entry)
    if (begin < end) & (begin == start + PART):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = tl.max_constancy(offs_d < width, VECTOR)
        first = tl.multiple_of((start // PART).to(tl.int64) * width, VECTOR)
        total = tl.load(partial_ptr + first + offs_d, mask_d, other=0.0)
        behind = (further + 1 + slot).to(tl.int64)
        parts = (end - begin + PART - 1) // PART
        sums = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
        for i in range(0, parts, BLOCK_N):
            offs_n = i + tl.arange(0, BLOCK_N)
            row = tl.multiple_of((behind + offs_n) * width, VECTOR)
            mask = (offs_n < parts)[:, None] & mask_d
            sums += tl.load(partial_ptr + row[:, None] + offs_d, mask, other=0.0)
        total += tl.sum(sums, 0)
        out = tl.multiple_of(entry.to(tl.int64) * width, VECTOR)
        tl.store(out_ptr + out + offs_d, total.to(out_ptr.dtype.element_ty), mask_d)


@compiled_for(aligned=("rows_ptr", "out_ptr"))
def _segment_sum_own_kernel(
    rows_ptr,
    entries_ptr,
    row_of_ptr,
    weights_ptr,
    out_ptr,
    stride_r,
    num_contributions,
    bank_size,
    width,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum by entry the contributions of one example, to whose bank no other program adds.

    The program of an entry's first contribution takes the others, too, in their order.
    """
    blocks = (num_contributions + BLOCK_N - 1) // BLOCK_N
    example = (tl.program_id(0) // blocks).to(tl.int64)
    begin = example * num_contributions
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < width, VECTOR)
    entries_ptr += begin
    entry = tl.load(entries_ptr + offs_n, offs_n < num_contributions, other=bank_size)
    mask_n = (entry >= 0) & (entry < bank_size)
    mask_n &= offs_n == _next_of_entry(
        entries_ptr, num_contributions, entry, tl.full((BLOCK_N,), -1, tl.int32)
    )
    total = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    place = tl.where(mask_n, offs_n, num_contributions)
    while tl.min(place, 0) < num_contributions:
        taken, mask = begin + place, place < num_contributions
        total += _contributions(
            rows_ptr, row_of_ptr, weights_ptr, taken, mask, offs_d, mask_d, stride_r, VECTOR
        )
        place = _next_of_entry(entries_ptr, num_contributions, entry, place)
    start = tl.multiple_of((example * bank_size + entry) * width, VECTOR)
    mask = mask_n[:, None] & mask_d
    tl.store(out_ptr + start[:, None] + offs_d, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _next_of_entry(entries_ptr, num_contributions, entry, place):
    """Return the first place behind the given one with the same entry, else their number."""
    found = tl.full(place.shape, 1 << 30, tl.int32)
    for start in range(0, num_contributions, 64):
        offs = start + tl.arange(0, 64)
        other = tl.load(entries_ptr + offs, offs < num_contributions, other=-1)
        same = (entry[:, None] == other) & (offs > place[:, None])
        found = tl.minimum(found, tl.min(tl.where(same, offs, 1 << 30), 1))
    return tl.minimum(found, num_contributions)


@triton.jit
def _contributions(
    rows_ptr,
    row_of_ptr,
    weights_ptr,
    taken,
    mask_n,
    offs_d,
    mask_d,
    stride_r,
    VECTOR: tl.constexpr,
):
    """Return weights[p] · rows[row_of[p]] in float32 for the p that are taken, zero elsewhere."""
    row = taken
    if row_of_ptr is not None:
        row = tl.load(row_of_ptr + taken, mask_n, other=0)
        mask_n &= row >= 0
    start = tl.multiple_of(row.to(tl.int64) * stride_r, VECTOR)
    mask = mask_n[:, None] & mask_d
    part = tl.load(rows_ptr + start[:, None] + offs_d, mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        part *= tl.load(weights_ptr + taken, mask_n, other=0.0)[:, None]
    return part
