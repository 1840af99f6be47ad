"""Sequences of the parity task: symbols 1, 0 and -1, and whether the number of ones is odd."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

SYMBOLS = (0, 1, -1)
"""The symbols in the order of their one-hot features."""
CLASS_NAMES = ("even", "odd")
"""What the labels 0 and 1 say of the number of ones."""


class ParitySequences(NamedTuple):
    """Sequences and their labels."""

    symbols: Tensor
    """(count, length) int64, each -1, 0 or 1."""
    labels: Tensor
    """(count,) int64, 1 where the number of ones is odd."""

    def one_hot(self) -> Tensor:
        """Return what the models take, (count, length, 3) float32."""
        # As an index from the end, -1 is the last of the three features.
        return functional.one_hot(self.symbols % len(SYMBOLS), len(SYMBOLS)).float()


def uniform_sequences(count: int, length: int, generator: Generator) -> ParitySequences:
    """Return sequences each symbol of which is 1, 0 or -1, all equally likely.

    Source: the protocol of scenic's AdaTape.
    """
    return _labelled(torch.randint(-1, 2, (count, length), generator=generator))


def sparse_sequences(
    count: int, length: int, ones: tuple[int, int], generator: Generator
) -> ParitySequences:
    """Return sequences with a random number of symbols that are not 0, at random places.

    Args:
        count: number of sequences.
        length: number of symbols of each.
        ones: the least and the most symbols that are 1 or -1; their number is uniform in between.
        generator: where the random numbers come from.

    Source: Banino et al., PonderNet, arXiv:2107.05407, section 4.1.
    """
    least, most = ones
    chosen = torch.randint(least, most + 1, (count, 1), generator=generator)
    signs = 2 * torch.randint(0, 2, (count, length), generator=generator) - 1
    # The first places of a random order are as good as any others.
    order = torch.rand(count, length, generator=generator).argsort(1)
    return _labelled(torch.zeros_like(signs).scatter_(1, order, signs * _first(chosen, length)))


def _first(lengths: Tensor, length: int) -> Tensor:
    """Return (count, length), 1 at the first places of each row and then 0."""
    return (torch.arange(length) < lengths).long()


def _labelled(symbols: Tensor) -> ParitySequences:
    return ParitySequences(symbols, (symbols == 1).sum(1) % 2)
