"""Rows leave: those of each example that are kept, packed with no gap (SPEC 13).

packed[p] = data[source[p]]   for source, ascending: the rows r < cu_tapes[batch] where keep[r]
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.offsets import as_int32, check_offsets_tensor
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.compact_rows import (
    compiled,
    eager,
    triton_backward,
    triton_forward,
)
from adatape_kernels.ops.fast_autograd import dynamic_size
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.reading_checks import check_capacity
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.row_checks import check_ascending, check_kept
from adatape_kernels.ops.second_derivative import twice_differentiable


def compact_rows(
    data: Tensor,
    keep: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep some rows of each example, in their order, and let the others leave.

    Args:
        data: (rows, dim); float32, float16, bfloat16 or float64.
        keep: (rows,) bool, True where a row is kept; ignored where no example owns the row.
        cu_inputs: (batch + 1,) int32 or int64, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32 or int64, the bounds of each example's tape rows.
        capacity: rows to return, used or not; None for exactly those that are kept, which copies
            their number to the host.

    Returns:
        The rows that are kept (kept or capacity, dim), zero in unused rows; cu_inputs and cu_tapes
        for them, int32; and source (kept or capacity,) int32, the row of data that each of them
        was, -1 for unused rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, the offsets are none, or the
            capacity is too small.
        TypeError: an argument is of another type altogether.

    On a GPU Triton's kernels copy nothing to the host with a capacity, and those in CUDA C++ look
    at no value at all, so that none is refused: offsets move into 0 to rows, and rows beyond the
    capacity are dropped, which `cu_tapes[-1] > capacity` of the result shows.

    Differentiable in data.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> keep = torch.tensor([True, False, True, True])
        >>> cu_inputs, cu_tapes = torch.tensor([0, 2, 3]), torch.tensor([3, 4, 4])
        >>> packed, cu_inputs, cu_tapes, source = ak.ops.compact_rows(
        ...     data, keep, cu_inputs, cu_tapes
        ... )
        >>> packed.flatten().tolist(), source.tolist()
        ([1.0, 3.0, 4.0], [0, 2, 3])
        >>> cu_inputs.tolist(), cu_tapes.tolist()
        ([0, 1, 2], [2, 3, 3])

    Source: SPEC 13.
    """
    found = _FORWARD.at_once(data, keep, cu_inputs, cu_tapes, capacity)
    if found is None:
        _check(data, keep, cu_inputs, cu_tapes, capacity)
        cu_inputs, cu_tapes = as_int32("cu_inputs", cu_inputs), as_int32("cu_tapes", cu_tapes)
        found = _FORWARD.overload(data, keep, cu_inputs, cu_tapes, capacity)
    return found


def _check(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> None:
    check_tensor("data", data)
    check_tensor("keep", keep)
    shape, device = data.shape, data.device
    if len(shape) != 2 or data.dtype not in FLOAT_DTYPES:
        raise ValueError(
            "data: expected floating-point of 16 to 64 bits (rows, dim), "
            f"got {data.dtype} {tuple(shape)}"
        )
    if keep.shape != shape[:1] or keep.dtype != torch.bool:
        raise ValueError(
            f"keep: expected bool ({shape[0]},) like data, got {keep.dtype} {tuple(keep.shape)}"
        )
    if keep.device != device:
        raise ValueError(f"keep: expected a tensor on {device}, got {keep.device}")
    check_offsets_tensor("cu_inputs", cu_inputs, data)
    check_offsets_tensor("cu_tapes", cu_tapes, data)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )
    check_capacity(capacity)


def _fake(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = dynamic_size() if capacity is None else capacity
    return (
        data.new_empty(rows, data.shape[1]),
        cu_inputs.new_empty(cu_inputs.shape),
        cu_tapes.new_empty(cu_tapes.shape),
        cu_inputs.new_empty(rows),
    )


def _fake_bwd(dpacked: Tensor, source: Tensor, rows: int) -> Tensor:
    return dpacked.new_empty(rows, dpacked.shape[1])


def _check_values(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> None:
    check_kept(keep, cu_inputs, cu_tapes, len(data), capacity)


def _check_values_bwd(dpacked: Tensor, source: Tensor, rows: int) -> None:
    check_ascending(source, rows)


def _typical(dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of a call of three examples."""
    offsets = meta(4, dtype=torch.int32)
    return meta(600, 384, dtype=dtype), meta(600, dtype=torch.bool), offsets, offsets, 300


def _typical_bwd(dtype: torch.dtype) -> tuple[Any, ...]:
    return meta(300, 384, dtype=dtype), meta(300, dtype=torch.int32), 600


_FORWARD = Operation(
    "compact_rows(Tensor data, Tensor keep, Tensor cu_inputs, Tensor cu_tapes, SymInt? capacity) "
    "-> (Tensor packed, Tensor kept_inputs, Tensor kept_tapes, Tensor source)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.compact_rows,
        "cuda": compiled.cuda_forward,
    },
    typical={"any shape": _typical},
    check_arguments=op_checks.compact_rows,
    check_values=_check_values,
    int32=("cu_inputs", "cu_tapes"),
)
_BACKWARD = Operation(
    "compact_rows_bwd(Tensor dpacked, Tensor source, SymInt rows) -> Tensor ddata",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.compact_rows_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical={"any shape": _typical_bwd},
    check_arguments=op_checks.compact_rows_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(output[3])


def _backward(ctx: Any, dpacked: Tensor, *of_numbers: Any) -> tuple:
    (source,) = ctx.saved_tensors
    return _BACKWARD.overload(dpacked, source, ctx.rows), None, None, None, None


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    *tensors, capacity = inputs
    return reference.compact_rows(*tensors, capacity=capacity)


def _gradients(dpacked: Tensor, source: Tensor, rows: int) -> tuple[Tensor]:
    return (reference.compact_rows_bwd(dpacked, source, rows),)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients)


@flop_formula(torch.ops.adatape.compact_rows)
def _flops(*shapes: Any, **names: Any) -> int:
    """Nothing is computed."""
    return 0


@flop_formula(torch.ops.adatape.compact_rows_bwd)
def _flops_bwd(*shapes: Any, **names: Any) -> int:
    """Nothing is computed."""
    return 0
