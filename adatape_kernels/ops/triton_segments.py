"""Sort the contributions to a bank that examples share into segments, one for each bank entry."""

from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for

# Contributions that a program counts.
_BLOCK_COUNTS = 256


class SegmentOrder(NamedTuple):
    """The contributions to a shared bank, entry by entry."""

    order: Tensor
    """(n,), the contributions, those of one entry next to each other."""
    starts: Tensor
    """(bank_size + 1,) int32, where each entry's begin in `order`; those of none stand behind."""


def segments_in_order(entries: Tensor, bank_size: int) -> SegmentOrder:
    """Sort the contributions by entry and, within a segment, by their place among all of them."""
    in_order, order = torch.sort(entries, stable=True)
    limits = torch.arange(bank_size + 1, dtype=torch.int32, device=entries.device)
    return SegmentOrder(order, torch.searchsorted(in_order, limits, out_int32=True))


def segments_in_any_order(entries: Tensor, bank_size: int) -> SegmentOrder:
    """Count each entry's contributions; within a segment they stand as they were counted."""
    counts, number = entries.new_zeros(bank_size + 1), entries.shape[0]
    ranks, order = entries.new_empty(number), entries.new_empty(number)
    grid = (num_blocks(number, _BLOCK_COUNTS),)
    sizes = dict(num_contributions=number, bank_size=bank_size)
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
    starts = counts.cumsum_(0)
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
    return SegmentOrder(order, starts)


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
