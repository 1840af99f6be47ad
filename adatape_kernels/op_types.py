"""What the ops take and return beside tensors, and the dtype that they accumulate in."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossType = Literal["entropy", "max"]

Activation = Literal["gelu_tanh", "gelu", "relu"]
"""What the feed-forward for input rows has between its products; "gelu" is GELU's exact form."""

ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "gelu", "relu")
"""The names of the activations."""


class TapeSelection(NamedTuple):
    """What each example read: the result of `tape_select`.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> read = ak.ops.tape_select(
        ...     torch.ones(1, 4), torch.ones(5, 4), num_tape_tokens=2, topk=1, halt_threshold=1.0
        ... )
        >>> read.indices.tolist(), read.weights.tolist(), read.ponder.tolist()
        ([[[0], [-1]]], [[[1.0], [0.0]]], [0.0])
    """

    indices: Tensor
    """(batch, num_tape_tokens, topk) int32 entries of the bank, best first; -1 in unused rows."""
    weights: Tensor
    """(batch, num_tape_tokens, topk) float32 merging weights, 0 in unused rows; differentiable."""
    counts: Tensor
    """(batch,) int32 tape tokens read."""
    ponder: Tensor
    """(batch,) float32 ponder loss; differentiable."""


class FFN(NamedTuple):
    """Parameters of a feed-forward, as `nn.Linear` holds them.

    A GLU's first layer yields [a, g]: w1 is (2 · hidden, dim), w2 (dim, hidden).

    Example:
        >>> import torch, adatape_kernels as ak
        >>> first, second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        >>> ffn = ak.ops.FFN(first.weight, first.bias, second.weight, second.bias)
        >>> ffn.w1.shape
        torch.Size([8, 4])
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that results are accumulated in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
