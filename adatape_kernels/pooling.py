"""The rows of each example reduced to one (SPEC 6)."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["token", "mean", "max", "sum"]
"""What stands for an example: its first input row, or its rows' mean, maximum or sum."""

_CHAINS = 32


def pool_rows(
    data: Tensor,
    example: Tensor,
    place: Tensor,
    lens: Tensor,
    kind: Literal["mean", "max", "sum"],
) -> Tensor:
    """Reduce each example's rows to one.

    Args:
        data: (rows, dim).
        example: (rows,) int64, the example that owns each row; their number where none does.
        place: (rows,) int64, which of its example's rows each row is, tape rows behind input rows.
        lens: (batch,), the number of rows of each example.
        kind: how they are reduced; over no rows it is 0.

    Returns:
        (batch, dim), dtype of data; summed in float32, or in float64 for float64 data.
    """
    batch, dim = lens.shape[0], data.shape[1]
    if kind == "max":
        low = data.new_full((batch + 1, dim), -torch.inf)
        # scatter_reduce shares a gradient among the rows that equal the maximum. None equals a
        # maximum of NaN, so that unused rows that hold NaN would get 0 / 0.
        rows = data.where((example < batch).unsqueeze(1), 0)
        index = example.unsqueeze(1).expand_as(rows)
        largest = low.scatter_reduce(0, index, rows, "amax")[:-1]
        return largest.where(lens.unsqueeze(1) > 0, 0)
    wide = torch.promote_types(data.dtype, torch.float32)
    # The rows of an example are dealt to so many chains of additions, because what a chain in
    # float32 rounds off grows with its length. Halves are added up in the same order in any batch.
    total = torch.zeros((batch + 1) * _CHAINS, dim, dtype=wide, device=data.device)
    total = total.index_add(0, example * _CHAINS + place % _CHAINS, data.to(wide))
    total = total.unflatten(0, (-1, _CHAINS))[:-1]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    total = total[:, 0]
    if kind == "mean":
        total = total / lens.unsqueeze(1).clamp(min=1)
    return total.to(data.dtype)
