"""Checks of the values that say where rows come from: `compact_rows` and `accumulate_rows`.

Each copies values to the host.
"""

import torch
from torch import Tensor

from adatape_kernels.offsets import check_examples


def check_kept(
    keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, num_rows: int, capacity: int | None
) -> None:
    """Refuse offsets that are none, and a capacity that is too small for the rows kept."""
    check_examples(cu_inputs, cu_tapes, num_rows, None)
    if capacity is None:
        return
    kept = int(keep[: int(cu_tapes[-1])].sum())
    if kept > capacity:
        raise ValueError(f"capacity: expected at least the {kept} rows kept, got {capacity}")


def check_ascending(source: Tensor, num_rows: int) -> None:
    """Refuse what is not the source of `compact_rows`: ascending row numbers, and then -1."""
    # As numbers without a sign, -1 stands behind every row.
    numbers = source.long() & 0xFFFFFFFF
    unused = source == -1
    wrong = ~unused & ((source < 0) | (source >= num_rows))
    wrong[1:] |= ~unused[1:] & (numbers[1:] <= numbers[:-1])
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"source: expected ascending numbers of {num_rows} rows and then -1, "
            f"got {int(source[place])} at {place}"
        )


def check_distinct(source: Tensor, num_rows: int) -> None:
    """Refuse a source of `accumulate_rows` outside the total, and one that comes twice."""
    outside = (source < -1) | (source >= num_rows)
    if bool(outside.any()):
        raise ValueError(
            f"source: expected -1 to {num_rows - 1} (a row of total), got {int(source[outside][0])}"
        )
    times = torch.bincount(source[source >= 0].long(), minlength=1)
    if int(times.max()) > 1:
        raise ValueError(
            f"source: expected each row of total once, got {int(times.argmax())} "
            f"{int(times.max())} times"
        )
