"""The rows of each example reduced to one (SPEC 6)."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["token", "mean", "max", "sum"]
"""What stands for an example: its first input row, or its rows' mean, maximum or sum."""


# So many rows are added up one after the other, and then so many of these sums. What a chain of
# float additions rounds off grows with its length, and an example may have thousands of rows.
_CHAIN = 16


def pool_rows(
    data: Tensor,
    example: Tensor,
    place: Tensor,
    starts: Tensor,
    kind: Literal["mean", "max", "sum"],
) -> Tensor:
    """Reduce each example's rows to one.

    Args:
        data: (rows, dim).
        example: (rows,) int64, the example that owns each row; their number where none does.
        place: (rows,) int64, where each row would be if the rows of one example followed those of
            another, its input rows before its tape rows, with those that none owns at the end.
        starts: (batch + 1,) int64, where each example would begin, and the last one would end.
        kind: how they are reduced; over no rows it is 0.

    Returns:
        (batch, dim), dtype of data; summed in float32, or in float64 for float64 data.
    """
    lens = starts.diff()
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
    sums = data.to(wide)
    for _ in range(2):
        sums, example, place, starts = _summed_in_chains(sums, example, place, starts)
    total = torch.zeros(batch + 1, dim, dtype=wide, device=data.device)
    total = total.index_add(0, example, sums)[:-1]
    if kind == "mean":
        total = total / lens.unsqueeze(1).clamp(min=1)
    return total.to(data.dtype)


def _summed_in_chains(
    rows: Tensor, example: Tensor, place: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up every _CHAIN rows of an example, from its first on.

    The order of addition depends on the example's own rows alone. Between examples there may be
    rows of zeros, so that the number of sums follows from the sizes.

    Returns:
        The sums, in place of the rows, and the other arguments for them.
    """
    after = starts // _CHAIN + torch.arange(starts.shape[0], device=starts.device)
    number = rows.shape[0] // _CHAIN + starts.shape[0]
    to = after[example] + (place - starts[example]) // _CHAIN
    sums = torch.zeros(number, rows.shape[1], dtype=rows.dtype, device=rows.device)
    place = torch.arange(number, device=rows.device)
    return (
        sums.index_add(0, to, rows),
        torch.searchsorted(after[1:], place, right=True),
        place,
        after,
    )
