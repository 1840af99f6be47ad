"""Sum weighted rows into the bank entries that they belong to: a gather's gradient.

out[m] = Σ_p weights[p] · rows[row_of[p]]   over the contributions p with entries[p] = m

The contributions to one bank entry are its segment. The backwards of `tape_select` and of
`tape_gather` end in this sum, which is no op of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for, elements_per_access

# In a bank of an example's own, the contributions that a program looks at together; in a segment of
# a shared bank, those that it adds up together. Segments are short, and have a warp each.
_BLOCK_N, _BLOCK_SEGMENT = 8, 4
# Features of a program's block: a warp's lanes then move 16 bytes at a time.
_BLOCK_D = 256
# Contributions that a program counts.
_BLOCK_COUNTS = 256


class _Segments(NamedTuple):
    """The contributions to a shared bank, entry by entry."""

    order: Tensor
    """(n,), the contributions, those of one entry next to each other."""
    starts: Tensor
    """(bank_size + 1,) int32, where each entry's begin in `order`; those of none stand behind."""


def segment_sum(
    rows: Tensor,
    entries: Tensor,
    bank_size: int,
    dtype: torch.dtype,
    *,
    row_of: Tensor | None = None,
    weights: Tensor | None = None,
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
        row_of: int32, shaped as entries, the row of each contribution; None for its own place
            among the entries, flattened.
        weights: as many float32 factors; None for 1.
        ordered: sum in a fixed order, so that equal input gives equal bits; False, for a shared
            bank, sums a segment in whatever order it was counted in, which spares sorting.

    Returns:
        ([batch,] bank_size, width), zero for entries without a contribution.
    """
    width = rows.shape[1]
    if entries.dim() == 1:
        make = _segments_in_order if ordered else _segments_in_any_order
        segments = make(entries, bank_size)
        out = rows.new_empty(bank_size, width, dtype=dtype)
        launch(
            _segment_sum_shared_kernel,
            (bank_size, num_blocks(width, _BLOCK_D)),
            rows_ptr=rows,
            order_ptr=segments.order,
            starts_ptr=segments.starts,
            row_of_ptr=row_of,
            weights_ptr=weights,
            out_ptr=out,
            stride_r=rows.stride(0),
            width=width,
            VECTOR=elements_per_access(rows),
            BLOCK_N=_BLOCK_SEGMENT,
            BLOCK_D=_BLOCK_D,
            num_warps=1,
        )
        return out
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


def _segments_in_order(entries: Tensor, bank_size: int) -> _Segments:
    """Sort the contributions by entry and, within a segment, by their place among all of them."""
    in_order, order = torch.sort(entries, stable=True)
    limits = torch.arange(bank_size + 1, dtype=torch.int32, device=entries.device)
    return _Segments(order, torch.searchsorted(in_order, limits, out_int32=True))


def _segments_in_any_order(entries: Tensor, bank_size: int) -> _Segments:
    """Count each entry's contributions; within a segment they stand as they were counted."""
    counts = entries.new_zeros(bank_size + 1)
    ranks, order = (entries.new_empty(len(entries)) for _ in range(2))
    grid = (num_blocks(len(entries), _BLOCK_COUNTS),)
    sizes = dict(num_contributions=len(entries), bank_size=bank_size)
    options = dict(BLOCK=_BLOCK_COUNTS, num_warps=4)
    launch(
        _count_contributions_kernel,
        grid,
        entries_ptr=entries,
        counts_ptr=counts,
        ranks_ptr=ranks,
        **sizes,
        **options,
    )
    starts = counts.cumsum(0, dtype=torch.int32)
    launch(
        _place_contributions_kernel,
        grid,
        entries_ptr=entries,
        starts_ptr=starts,
        ranks_ptr=ranks,
        order_ptr=order,
        **sizes,
        **options,
    )
    return _Segments(order, starts)


@compiled_for()
def _count_contributions_kernel(
    entries_ptr, counts_ptr, ranks_ptr, num_contributions, bank_size, BLOCK: tl.constexpr
):
    """Count the contributions of entry m in counts[m + 1]; note how many each one found there."""
    offs, entry, mask = _entries(entries_ptr, num_contributions, bank_size, BLOCK)
    rank = tl.atomic_add(counts_ptr + entry + 1, 1, mask, sem="relaxed")
    tl.store(ranks_ptr + offs, rank, mask)


@compiled_for()
def _place_contributions_kernel(
    entries_ptr, starts_ptr, ranks_ptr, order_ptr, num_contributions, bank_size, BLOCK: tl.constexpr
):
    """Put every contribution into the segment of its entry."""
    offs, entry, mask = _entries(entries_ptr, num_contributions, bank_size, BLOCK)
    place = tl.load(starts_ptr + entry, mask, other=0) + tl.load(ranks_ptr + offs, mask, other=0)
    tl.store(order_ptr + place, offs, mask)


@triton.jit
def _entries(entries_ptr, num_contributions, bank_size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(entries_ptr + offs, offs < num_contributions, other=bank_size)
    return offs, entry, (entry >= 0) & (entry < bank_size)


@compiled_for(aligned=("rows_ptr", "out_ptr"))
def _segment_sum_shared_kernel(
    rows_ptr,
    order_ptr,
    starts_ptr,
    row_of_ptr,
    weights_ptr,
    out_ptr,
    stride_r,
    width,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the segment of one entry of a bank that examples share."""
    entry = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < width, VECTOR)
    end = tl.load(starts_ptr + entry + 1)
    total = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    for start in range(tl.load(starts_ptr + entry), end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        taken = tl.load(order_ptr + offs_n, mask_n, other=0)
        total += _contributions(
            rows_ptr, row_of_ptr, weights_ptr, taken, mask_n, offs_d, mask_d, stride_r, VECTOR
        )
    out_ptrs = out_ptr + tl.multiple_of(entry.to(tl.int64) * width, VECTOR) + offs_d
    tl.store(out_ptrs, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask_d)


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
    start = tl.multiple_of(row.to(tl.int64) * stride_r, VECTOR)
    mask = mask_n[:, None] & mask_d
    part = tl.load(rows_ptr + start[:, None] + offs_d, mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        part *= tl.load(weights_ptr + taken, mask_n, other=0.0)[:, None]
    return part
