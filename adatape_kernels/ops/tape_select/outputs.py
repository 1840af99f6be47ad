"""The results of `tape_select` without values, as its fake and its Triton launcher make them."""

from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.op_types import wide_dtype


class SelectOutputs(NamedTuple):
    """What the op returns, in the order of its schema."""

    weights: Tensor  # (batch, num_tape_tokens, topk), float32 or wider
    ponder: Tensor  # (batch,), float32 or wider
    indices: Tensor  # (batch, num_tape_tokens, topk) int32
    counts: Tensor  # (batch,) int32


def empty_outputs(query: Tensor, num_tape_tokens: int, topk: int) -> SelectOutputs:
    """Return uninitialised results on the device of the query (batch, key_dim)."""
    batch, wide = query.shape[0], wide_dtype(query.dtype)
    return SelectOutputs(
        weights=query.new_empty(batch, num_tape_tokens, topk, dtype=wide),
        ponder=query.new_empty(batch, dtype=wide),
        indices=query.new_empty(batch, num_tape_tokens, topk, dtype=torch.int32),
        counts=query.new_empty(batch, dtype=torch.int32),
    )
