"""Offsets of rows that follow each other: made from lengths, checked, turned into row numbers."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.arguments import check_int, check_tensor

INTEGERS = (torch.int32, torch.int64)
"""The dtypes in which offsets, indices and lengths may be given."""


def cumulative(lens: Tensor, start: int = 0) -> Tensor:
    """Return the offsets of consecutive segments.

    Args:
        lens: (batch,) integers, the segments' lengths.
        start: where the first segment starts, 0 or more.

    Returns:
        (batch + 1,) int32, from `start`; segment i stretches from offset i to offset i + 1.

    Raises:
        ValueError: the lengths have another shape or dtype or, where they can be seen, one of them
            is negative or int32 does not hold their sum.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import cumulative
        >>> cumulative(torch.tensor([3, 0, 2]), start=10).tolist()
        [10, 13, 13, 15]
    """
    check_tensor("lens", lens)
    start = check_int("start", start)
    if lens.dtype not in INTEGERS or lens.dim() != 1:
        raise ValueError(
            f"lens: expected int32 or int64 (batch,), got {lens.dtype} {tuple(lens.shape)}"
        )
    offsets = F.pad(lens.cumsum(0), (1, 0)).add(start)
    if can_be_seen(offsets) and len(lens):
        shortest, last = int(lens.min()), int(offsets[-1])
        if shortest < 0:
            raise ValueError(f"lens: expected 0 or more, got {shortest}")
        if last > torch.iinfo(torch.int32).max:
            raise ValueError(f"lens: expected a sum that int32 holds, got {last}")
    return offsets.to(torch.int32)


def can_be_seen(values: Tensor) -> bool:
    """Return whether values lie on the host, where a look at them waits for nothing.

    They do not while torch traces, when a tensor that stands for another has a class of its own,
    nor inside a transform of torch.func, whose tensors have no memory.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import can_be_seen
        >>> can_be_seen(torch.tensor([0, 3])), can_be_seen(torch.tensor([0, 3], device="meta"))
        (True, False)
    """
    if type(values) is not Tensor or values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        values.data_ptr()
    except RuntimeError:
        return False
    return True


def check_offsets(name: str, offsets: Tensor, start: int, end: int, exact: bool = True) -> None:
    """Check that offsets begin at `start`, never descend and end at `end`; copies them to the host.

    Args:
        name: the offsets' name in an error.
        offsets: (batch + 1,) int32 or int64.
        start: the first offset.
        end: the last offset.
        exact: whether the last offset must be `end`; otherwise it may be smaller.

    Raises:
        ValueError: they do not, or have another shape or dtype.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import check_offsets
        >>> check_offsets("cu_inputs", torch.tensor([0, 3, 2], dtype=torch.int32), 0, 2)
        Traceback (most recent call last):
        ValueError: cu_inputs: expected ascending offsets, got 3 then 2 at 1, 2
    """
    check_offsets_tensor(name, offsets, offsets)
    values = offsets.tolist()
    if values[0] != start:
        raise ValueError(f"{name}: expected the first offset to be {start}, got {values[0]}")
    for i, (low, high) in enumerate(itertools.pairwise(values)):
        if high < low:
            raise ValueError(
                f"{name}: expected ascending offsets, got {low} then {high} at {i}, {i + 1}"
            )
    if values[-1] != end if exact else values[-1] > end:
        bound = "" if exact else "at most "
        raise ValueError(
            f"{name}: expected the last offset to be {bound}{end} (the number of rows), "
            f"got {values[-1]}"
        )


def check_examples(
    cu_inputs: Tensor, cu_tapes: Tensor, num_rows: int, max_rows: int | None
) -> None:
    """Check the values of a layout's offsets; copies them to the host.

    Args:
        cu_inputs: (batch + 1,) int32, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32, the bounds of each example's tape rows.
        num_rows: number of rows of the buffer; those behind the last offset may be unused.
        max_rows: a bound on the rows of an example, or None.

    Raises:
        ValueError: the offsets do not ascend, do not join or exceed the buffer, there are more of
            one kind than of the other, or an example has more than max_rows rows.
    """
    check_offsets("cu_inputs", cu_inputs, 0, num_rows, exact=False)
    check_offsets("cu_tapes", cu_tapes, int(cu_inputs[-1]), num_rows, exact=False)
    if len(cu_tapes) != len(cu_inputs):
        raise ValueError(
            f"cu_tapes: expected ({len(cu_inputs)},) like cu_inputs, got ({len(cu_tapes)},)"
        )
    longest = max((cu_inputs.diff() + cu_tapes.diff()).tolist(), default=0)
    if max_rows is not None and longest > max_rows:
        raise ValueError(f"max_rows: expected at least {longest} (the longest), got {max_rows}")


def packed_order(cu_inputs: Tensor, cu_tapes: Tensor, total: int) -> Tensor:
    """Return where the rows of a layout lie, in the order of the examples.

    Args:
        cu_inputs: (batch + 1,) int32, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32, the bounds of each example's tape rows.
        total: number of rows that examples own. The caller states it, since reading it from the
            offsets would synchronise.

    Returns:
        (total,) int64 row numbers: first the input rows and tape rows of example 0, then those of
        example 1, and so on.

    Raises:
        ValueError: a shape or dtype differs from the above or, where the offsets can be seen, they
            are none or their examples do not own `total` rows. Elsewhere wrong offsets give wrong
            row numbers.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import cumulative, packed_order
        >>> cu_inputs = cumulative(torch.tensor([2, 1]))
        >>> cu_tapes = cumulative(torch.tensor([1, 1]), start=3)
        >>> packed_order(cu_inputs, cu_tapes, total=5).tolist()
        [0, 1, 3, 2, 4]
    """
    check_int("total", total)
    check_offsets_tensor("cu_inputs", cu_inputs, cu_inputs)
    check_offsets_tensor("cu_tapes", cu_tapes, cu_inputs)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )
    input_lens = cu_inputs.diff()
    lens = input_lens + cu_tapes.diff()
    if can_be_seen(lens):
        check_examples(cu_inputs, cu_tapes, max(int(cu_inputs[-1]), int(cu_tapes[-1])), None)
        owned = int(lens.sum())
        if owned != total:
            raise ValueError(f"total: expected the {owned} rows that examples own, got {total}")
    example = torch.repeat_interleave(lens, output_size=total)
    row = torch.arange(total, device=lens.device) - cumulative(lens)[example]
    in_tape = row - input_lens[example]
    return torch.where(in_tape < 0, cu_inputs[example] + row, cu_tapes[example] + in_tape)


def check_offsets_tensor(name: str, offsets: Tensor, data: Tensor) -> None:
    """Check that offsets are integers (batch + 1,) on the device of `data`.

    Raises:
        ValueError: they are not.
        TypeError: they are no tensor.
    """
    check_tensor(name, offsets)
    shape = offsets.shape
    if offsets.dtype not in INTEGERS or len(shape) != 1 or shape[0] == 0:
        raise ValueError(
            f"{name}: expected int32 or int64 (batch + 1,), got {offsets.dtype} {tuple(shape)}"
        )
    check_same_device(name, offsets, data)


def as_int32(name: str, values: Tensor) -> Tensor:
    """Return int32 or int64 values as int32, as the kernels take them.

    Args:
        name: the values' name in an error.
        values: of any shape.

    Raises:
        ValueError: they are no int32 or int64, or int32 does not hold a value that lies on the
            host. On a GPU and while torch traces, where nobody can look at them,
            `limited_to_int32` is all that is done.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import as_int32
        >>> as_int32("cu_inputs", torch.tensor([0, 3])).dtype
        torch.int32
        >>> as_int32("cu_inputs", torch.tensor([0, 1 << 40]))
        Traceback (most recent call last):
        ValueError: cu_inputs: expected values that int32 holds, got 1099511627776
    """
    check_tensor(name, values)
    if values.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected int32 or int64, got {values.dtype}")
    limited = limited_to_int32(values)
    if limited is not values and can_be_seen(values):
        wrong = values[limited != values]
        if len(wrong):
            raise ValueError(f"{name}: expected values that int32 holds, got {int(wrong[0])}")
    return limited


def limited_to_int32(values: Tensor) -> Tensor:
    """Return int32 or int64 values as int32; what it does not hold becomes its nearest number.

    A value that is too large thereby stays too large, and no wrong value becomes a right one.

    Example:
        >>> import torch
        >>> from adatape_kernels.offsets import limited_to_int32
        >>> limited_to_int32(torch.tensor([5, 1 << 40])).tolist()
        [5, 2147483647]
    """
    if values.dtype == torch.int32:
        return values
    limits = torch.iinfo(torch.int32)
    return values.clamp(limits.min, limits.max).to(torch.int32)


def check_same_device(name: str, tensor: Tensor, data: Tensor) -> None:
    """Check that a tensor is on the device of `data`. Raises ValueError."""
    if tensor.device != data.device:
        raise ValueError(f"{name}: expected a tensor on {data.device}, got {tensor.device}")
