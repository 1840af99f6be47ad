"""Checks of what an elastic batch is made of, and of the tape that is appended to one."""

from torch import Tensor

from adatape_kernels.arguments import check_flag, check_tensor
from adatape_kernels.offsets import (
    as_int32,
    can_be_seen,
    check_offsets,
    check_offsets_tensor,
    check_same_device,
)


def checked_tape_offsets(
    data: Tensor, cu_tapes: Tensor, tape: Tensor, offsets: Tensor, max_tapes: int, exact: bool
) -> Tensor:
    """Return the offsets of `ElasticBatch.append_tape` in int32; raises as it says."""
    check_tensor("tape", tape)
    if tape.dim() != 2 or tape.shape[1] != data.shape[1]:
        raise ValueError(
            f"tape: expected (tape_rows, {data.shape[1]}) like data, got {tuple(tape.shape)}"
        )
    check_same_device("tape", tape, data)
    check_offsets_tensor("offsets", offsets, data)
    if offsets.shape != cu_tapes.shape:
        raise ValueError(
            f"offsets: expected {tuple(cu_tapes.shape)} like cu_tapes, got {tuple(offsets.shape)}"
        )
    check_flag("exact", exact)
    limited = as_int32("offsets", offsets)
    if can_be_seen(limited):
        check_offsets("offsets", limited, 0, tape.shape[0], exact)
        longest = max(limited.diff().tolist(), default=0)
        if longest > max_tapes:
            raise ValueError(
                f"max_tapes: expected at least {longest} (the longest), got {max_tapes}"
            )
    return limited.contiguous()


def check_layout(
    data: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    data_name: str = "data",
    offsets_name: str | None = None,
) -> None:
    """Check shapes, dtypes and devices of a buffer and its offsets. Raises ValueError."""
    check_tensor(data_name, data)
    if data.dim() != 2:
        raise ValueError(f"{data_name}: expected (rows, dim), got {tuple(data.shape)}")
    for name, offsets in (("cu_inputs", cu_inputs), ("cu_tapes", cu_tapes)):
        check_offsets_tensor(offsets_name or name, offsets, data)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )
