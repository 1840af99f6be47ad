"""A bank of which a backward pass sees the entries that were read, and no others (SPEC 2 and 3).

A read takes num_tape_tokens · topk entries of an example's bank: 50 of 784 in the default model.
What makes the bank runs without a gradient, for all entries. It runs again for those that were
read, with one, so that nothing as large as the bank is kept for the backward pass or written in it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.fast_autograd import reverse_mode_alone

# docs/gpu-performance.md has the arithmetic behind these, and docs/design.md what was measured.
LARGEST_SHARE = 1 / 3
"""The largest share of a bank that is made twice."""
LEAST_ELEMENTS = 1 << 23
"""The smallest bank of a batch, in elements, of which rows are made twice."""
LEAST_FROM_PATCHES_ON_CPU = 1 << 17
"""The same where a processor makes the rows from patches: fewer, as no launches are to be saved."""


class RecomputedBank(NamedTuple):
    """The entries of a bank of each example's own, and what makes some of them once more.

    Example:
        >>> import torch
        >>> from adatape_kernels.layers.recomputed_bank import recomputed
        >>> bank = recomputed(torch.randn(2, 30, 8))
        >>> bank.rows(torch.tensor([[7], [9]]), torch.tensor([[True], [False]])).shape
        torch.Size([2, 1, 8])
    """

    entries: Tensor
    """(batch, bank_size, dim), without a gradient."""
    rows: Callable[[Tensor, Tensor], Tensor]
    """Takes places in the bank, (batch, rows) int64, and a mask of the same shape, False where
    nothing was read; returns (batch, rows, dim), differentiable, and finite where nothing was."""


def recomputed(bank: Tensor) -> RecomputedBank:
    """Return a bank (batch, bank_size, dim) whose rows are copies of the tensor's."""
    return RecomputedBank(bank.detach(), functools.partial(_rows_of, bank))


def _rows_of(bank: Tensor, places: Tensor, read: Tensor) -> Tensor:
    return bank[examples_of(places), places].where(read.unsqueeze(2), 0)


def examples_of(places: Tensor) -> Tensor:
    """Return (batch, 1) int64, the example that each row of places belongs to."""
    return torch.arange(places.shape[0], device=places.device).unsqueeze(1)


def rows_of_selection(indices: Tensor, bank_size: int) -> tuple[Tensor, Tensor]:
    """Return the places of the entries that were selected, and which of them exist.

    Args:
        indices: (batch, num_tape_tokens, topk), of a `TapeSelection`.
        bank_size: number of entries, which ends a read that has taken them all.
    """
    steps = min(indices.shape[1], bank_size // indices.shape[2])
    places = indices[:, :steps].flatten(1).long()
    return places.clamp(min=0), places >= 0


def reads_little(bank_size: int, num_tape_tokens: int, topk: int) -> bool:
    """Return whether a read takes so small a share of its bank that its rows may be made twice."""
    rows = topk * min(num_tape_tokens, bank_size // topk)
    return 0 < rows <= LARGEST_SHARE * bank_size


def is_large(elements: int, device_type: str, *, from_patches: bool) -> bool:
    """Return whether the bank of a batch is so large that making rows twice pays.

    Args:
        elements: of the whole bank.
        device_type: where it lies.
        from_patches: whether the gradient passes what makes the bank, or ends in the bank.
    """
    few = from_patches and device_type == "cpu"
    return elements >= (LEAST_FROM_PATCHES_ON_CPU if few else LEAST_ELEMENTS)


def plain_backward_pass() -> bool:
    """Return whether autograd records, and its reverse mode is all that differentiates.

    In an exported program, which is there to be run forward, a bank is read as it is.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_exporting() and reverse_mode_alone()
