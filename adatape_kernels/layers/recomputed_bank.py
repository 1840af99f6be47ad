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

_READS_THAT_PAY = 0.5
"""The largest share of a bank that is worth being made twice; docs/gpu-performance.md has why."""


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


def is_worth_it(batch: int, bank_size: int, num_tape_tokens: int, topk: int) -> bool:
    """Return whether a read takes so little of its bank that rows are better made twice.

    It says no where what differentiates is not autograd's reverse mode, and in an exported program.
    """
    rows = topk * min(num_tape_tokens, bank_size // topk)
    return (
        torch.is_grad_enabled()
        and batch > 0
        and 0 < rows <= _READS_THAT_PAY * bank_size
        and not torch.compiler.is_exporting()
        and reverse_mode_alone()
    )
