"""What a model is fed, and what it makes of that before its encoder runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

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
