"""What a model is fed, and what it makes of that before its encoder runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adatape_kernels.elastic import ElasticBatch

ModelInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""A batch in one tensor; or, for a model that takes them, examples of many sizes."""


class Embedded(NamedTuple):
    """A batch as the encoder takes it."""

    tokens: ElasticBatch
    """The input rows of each example."""
    bank: Tensor | None
    """(batch, bank_size, dim), or None where the readers have learnable banks."""
    bank_lens: Tensor | None
    """(batch,) int32, how many leading tokens of each example's bank exist; None for all."""


def elastic_rows(rows: Tensor, lens: list[int]) -> ElasticBatch:
    """Return rows (rows, dim) of one or more examples as a batch, without synchronising.

    Args:
        rows: those of consecutive examples.
        lens: how many rows each example has.
    """
    cu_inputs = _on_device([0, *itertools.accumulate(lens)], rows)
    cu_tapes = torch.full_like(cu_inputs, len(rows))
    return ElasticBatch(rows, cu_inputs, cu_tapes, len(rows), min(lens), max(lens))


def padded_banks(rows: Tensor, lens: list[int], least: int) -> tuple[Tensor, Tensor | None]:
    """Return a bank for each of one or more examples, and how many tokens each has.

    Args:
        rows: (rows, dim), the tokens of consecutive banks.
        lens: how many tokens each bank has.
        least: fewest tokens of the bank that is returned; the ops take none with fewer than topk.

    Returns:
        (batch, longest, dim), padded with zeros, and (batch,) int32, or None where nothing is
        padded.
    """
    longest = max(least, *lens)
    if min(lens) == longest:
        return rows.unflatten(0, (len(lens), longest)), None
    banks = pad_sequence([*rows.split(lens)], batch_first=True)
    if longest > banks.shape[1]:
        banks = F.pad(banks, (0, 0, 0, longest - banks.shape[1]))
    return banks, _on_device(lens, rows)


def _on_device(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(like.device, non_blocking=True)
