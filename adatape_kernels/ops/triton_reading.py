"""What the Triton kernels of `tape_select`, `tape_gather` and `tape_read` share.

The softmax of a read's scores, and where each token's row of the tape is.
"""

from typing import NamedTuple

from torch import Tensor

from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for

BLOCK_D = 256
"""Features of a program's block: a warp covers them by one access of 16 bytes a lane at 16 bits a
feature, by two at 32."""

# Counts, and indices, of a program.
_BLOCK = 1024


class GatherOffsets(NamedTuple):
    """Where each example's rows are, on the device."""

    offsets: Tensor
    """(batch + 1,) int32."""
    status: Tensor | None
    """(2,) int32: the number of rows, and 1 where a count or an entry is corrupt; if asked for."""


def offsets_of(counts: Tensor, indices: Tensor, bank_size: int, *, checked: bool) -> GatherOffsets:
    """Sum the counts (batch,); `checked` says to look for corrupt counts and indices, too."""
    batch, num_tape_tokens, topk = indices.shape
    offsets, status = counts.new_empty(batch + 1), counts.new_zeros(2) if checked else None
    checks = num_blocks(indices.numel(), _BLOCK) if checked else 0
    launch(
        _tape_gather_offsets_kernel,
        (1 + checks,),
        counts_ptr=counts.contiguous(),
        indices_ptr=indices,
        offsets_ptr=offsets,
        status_ptr=status,
        batch=batch,
        num_tape_tokens=num_tape_tokens,
        bank_size=bank_size,
        TOPK=max(topk, 1),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return GatherOffsets(offsets, status)


@compiled_for()
def _tape_gather_offsets_kernel(
    counts_ptr,
    indices_ptr,
    offsets_ptr,
    status_ptr,
    batch,
    num_tape_tokens,
    bank_size,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the counts in program 0, and check the entries that are read in the others, if any.

    The status is the total, and 1 where a count or an entry is corrupt; it comes as zeros, or is
    None where nobody asks.
    """
    offs = tl.arange(0, BLOCK)
    corrupt = tl.zeros((BLOCK,), tl.int1)
    if tl.program_id(0) == 0:
        total = 0
        tl.store(offsets_ptr, total)
        for start in range(0, batch, BLOCK):
            mask = start + offs < batch
            given = tl.load(counts_ptr + start + offs, mask, other=0)
            count = tl.minimum(tl.maximum(given, 0), num_tape_tokens)
            tl.store(offsets_ptr + 1 + start + offs, total + tl.cumsum(count, 0), mask)
            total += tl.sum(count, 0)
            corrupt |= count != given
        if status_ptr is not None:
            tl.store(status_ptr, total)
    else:
        reads = (tl.program_id(0) - 1).to(tl.int64) * BLOCK + offs
        token = (reads // TOPK).to(tl.int32)
        example = token // num_tape_tokens
        mask = example < batch
        mask &= token % num_tape_tokens < tl.load(counts_ptr + example, mask, other=0)
        entry = tl.load(indices_ptr + reads, mask, other=0)
        corrupt = mask & ((entry < 0) | (entry >= bank_size))
    if status_ptr is not None:
        tl.atomic_max(status_ptr + 1, tl.max(corrupt.to(tl.int32), 0), sem="relaxed")


@triton.jit
def token_row(token, offsets_ptr, num_tape_tokens, num_rows):
    """Return a token's example and row, int64, and whether the row exists."""
    example = token // num_tape_tokens
    row = tl.load(offsets_ptr + example) + token % num_tape_tokens
    exists = row < tl.minimum(tl.load(offsets_ptr + example + 1), num_rows)
    return example.to(tl.int64), row.to(tl.int64), exists


@triton.jit
def softmax(scores, mask):
    """Softmax over the last axis; NaN everywhere if a score is NaN, or the best one infinite."""
    scores = tl.where(mask, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, -1, keep_dims=True))
    exponentials = tl.where(mask, exponentials, 0.0)
    # Rounded division: equal scores weigh exactly 1 / topk, so that halting at τ is exact.
    return tl.div_rn(exponentials, tl.sum(exponentials, -1, keep_dims=True))
