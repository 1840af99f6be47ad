"""Rows come home: each is added, weighted, to the row of a total that it comes from (SPEC 13).

sum[source[r]] = total_weights[r] · total[source[r]] + weights[r] · rows[r]
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.offsets import INTEGERS, as_int32
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.accumulate_rows import compiled, eager, triton_backward, triton_forward
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.row_checks import check_distinct
from adatape_kernels.ops.second_derivative import twice_differentiable


def accumulate_rows(
    total: Tensor,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    *,
    total_weights: Tensor | None = None,
) -> Tensor:
    """Return a total with weighted rows added to those of its rows that they come from.

    Args:
        total: (any number, dim), dtype of rows or float32 (float64 for float64 rows).
        rows: (rows, dim); float32, float16, bfloat16 or float64.
        source: (rows,) int32 or int64, the row of total that each row is added to, none of them
            twice; -1 for rows that are added to none.
        weights: (rows,) float32 (float64 for float64 rows), the factor of each row.
        total_weights: (rows,), dtype of weights, the factor of the total's row that each row is
            added to; None for 1.

    Returns:
        Shaped and typed as total, computed in at least float32 and rounded once. Rows of total that
        nothing is added to are copied. A weight of 0 does not hide NaN or infinity in its row; a
        source of -1 does.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or source names a row that
            total does not have, or one row of it twice.
        TypeError: an argument is of another type altogether.

    On a GPU no value is looked at: a row whose source lies outside is left out, and where several
    have the same, the values of that row of the total are undefined.

    Differentiable in total, rows, weights and total_weights.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> total, rows = torch.ones(3, 2), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
        >>> source, weights = torch.tensor([2, -1]), torch.tensor([0.5, 1.0])
        >>> ak.ops.accumulate_rows(total, rows, source, weights).tolist()
        [[1.0, 1.0], [1.0, 1.0], [6.0, 11.0]]

    Source: SPEC 13; scenic adatape/layers.py, where ACT accumulates its output.
    """
    found = _FORWARD.at_once(total, rows, source, weights, total_weights)
    if found is None:
        _check(total, rows, source, weights, total_weights)
        source = as_int32("source", source)
        found = _FORWARD.overload(total, rows, source, weights, total_weights)
    return found


def accumulate_rows_(
    total: Tensor,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    *,
    total_weights: Tensor | None = None,
) -> Tensor:
    """Add weighted rows to those rows of a total that they come from, in place; return the total.

    It moves the rows that are added and no others, where `accumulate_rows` copies the total.

    Args:
        total: as in `accumulate_rows`, which says what it becomes. No two of its elements lie at
            one place, and rows shares no memory with it.
        rows, source, weights, total_weights: as in `accumulate_rows`.

    Raises:
        ValueError, TypeError: as in `accumulate_rows`.
        NotImplementedError: a gradient or a tangent is asked for, which only `accumulate_rows` has.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> total, rows = torch.ones(3, 1), torch.tensor([[10.0], [20.0]])
        >>> source, weights = torch.tensor([2, 0]), torch.tensor([0.5, 1.0])
        >>> ak.ops.accumulate_rows_(total, rows, source, weights).flatten().tolist()
        [21.0, 1.0, 6.0]

    Source: SPEC 13.
    """
    _check(total, rows, source, weights, total_weights)
    _IN_PLACE.overload(total, rows, as_int32("source", source), weights, total_weights)
    return total


def _check(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> None:
    check_tensor("total", total)
    check_tensor("rows", rows)
    check_tensor("source", source)
    check_tensor("weights", weights)
    shape, dtype, device = rows.shape, rows.dtype, total.device
    if len(shape) != 2 or dtype not in FLOAT_DTYPES:
        raise ValueError(
            "rows: expected floating-point of 16 to 64 bits (rows, dim), "
            f"got {dtype} {tuple(shape)}"
        )
    wide = wide_dtype(dtype)
    if total.dim() != 2 or total.shape[1] != shape[1] or total.dtype not in (dtype, wide):
        either = f"{dtype}" if dtype == wide else f"{dtype} or {wide}"
        raise ValueError(
            f"total: expected {either} (any number, {shape[1]}) like rows, "
            f"got {total.dtype} {tuple(total.shape)}"
        )
    if source.shape != shape[:1] or source.dtype not in INTEGERS:
        raise ValueError(
            f"source: expected int32 or int64 ({shape[0]},) like rows, "
            f"got {source.dtype} {tuple(source.shape)}"
        )
    of_rows = [("rows", rows), ("source", source), ("weights", weights)]
    if total_weights is not None:
        check_tensor("total_weights", total_weights)
        of_rows.append(("total_weights", total_weights))
    for name, factors in of_rows[2:]:
        if factors.shape != shape[:1] or factors.dtype != wide:
            raise ValueError(
                f"{name}: expected {wide} ({shape[0]},) like rows, "
                f"got {factors.dtype} {tuple(factors.shape)}"
            )
    for name, tensor in of_rows:
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")


def _fake(total: Tensor, *rest: Any) -> Tensor:
    return total.new_empty(total.shape)


def _fake_in_place(total: Tensor, *rest: Any) -> None:
    return None


def _fake_bwd(
    dsum: Tensor,
    total: Tensor | None,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_total = (0, dsum.shape[1]) if total_weights is None else dsum.shape
    of_total_weights = 0 if total_weights is None else weights.shape
    return (
        dsum.new_empty(of_total),
        rows.new_empty(rows.shape),
        weights.new_empty(weights.shape),
        weights.new_empty(of_total_weights),
    )


def _check_values(total: Tensor, rows: Tensor, source: Tensor, *factors: Any) -> None:
    check_distinct(source, len(total))


def _check_values_bwd(
    dsum: Tensor, total: Tensor | None, rows: Tensor, source: Tensor, *factors: Any
) -> None:
    check_distinct(source, len(dsum))


def _typical(dtype: torch.dtype) -> tuple[Any, ...]:
    weights = meta(300, dtype=wide_dtype(dtype))
    total, rows = meta(600, 384, dtype=dtype), meta(300, 384, dtype=dtype)
    return total, rows, meta(300, dtype=torch.int32), weights, None


def _typical_bwd(dtype: torch.dtype) -> tuple[Any, ...]:
    total, *others = _typical(dtype)
    return total, None, *others


_FORWARD = Operation(
    "accumulate_rows(Tensor total, Tensor rows, Tensor source, Tensor weights, "
    "Tensor? total_weights) -> Tensor sum",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.accumulate_rows,
        "cuda": compiled.cuda_forward,
    },
    typical={"any shape": _typical},
    check_arguments=op_checks.accumulate_rows,
    check_values=_check_values,
    int32=("source",),
)
_IN_PLACE = Operation(
    "accumulate_rows_(Tensor(a!) total, Tensor rows, Tensor source, Tensor weights, "
    "Tensor? total_weights) -> ()",
    _fake_in_place,
    {
        "eager": eager.in_place,
        "cpp": compiled.cpp_in_place,
        "triton": triton_forward.accumulate_rows_,
        "cuda": compiled.cuda_in_place,
    },
    typical={"any shape": _typical},
    check_arguments=op_checks.accumulate_rows_,
    check_values=_check_values,
)
_BACKWARD = Operation(
    "accumulate_rows_bwd(Tensor dsum, Tensor? total, Tensor rows, Tensor source, Tensor weights, "
    "Tensor? total_weights) "
    "-> (Tensor dtotal, Tensor drows, Tensor dweights, Tensor dtotal_weights)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.accumulate_rows_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical={"any shape": _typical_bwd},
    check_arguments=op_checks.accumulate_rows_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    total, rows, source, weights, total_weights = inputs
    before = None if total_weights is None else total
    ctx.save_for_backward(before, rows, source, weights, total_weights)


def _backward(ctx: Any, dsum: Tensor) -> tuple:
    before, rows, source, weights, total_weights = ctx.saved_tensors
    dtotal, drows, dweights, dtotal_weights = _BACKWARD.overload(
        dsum, before, rows, source, weights, total_weights
    )
    if total_weights is None:
        return dsum, drows, None, dweights, None
    return dtotal, drows, None, dweights, dtotal_weights


def _plain_torch(inputs: tuple, output: Tensor) -> Tensor:
    *tensors, total_weights = inputs
    return reference.accumulate_rows(*tensors, total_weights=total_weights)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, reference.accumulate_rows_bwd)


@flop_formula(torch.ops.adatape.accumulate_rows)
def _flops(
    total: Any, rows: Any, source: Any, weights: Any, total_weights: Any, **names: Any
) -> int:
    """One multiply-add an element of the rows, and one more product with total_weights."""
    return (2 if total_weights is None else 3) * rows[0] * rows[1]


@flop_formula(torch.ops.adatape.accumulate_rows_)
def _flops_in_place(*shapes: Any, **names: Any) -> int:
    """The same."""
    return _flops(*shapes)


@flop_formula(torch.ops.adatape.accumulate_rows_bwd)
def _flops_bwd(
    dsum: Any, total: Any, rows: Any, source: Any, weights: Any, total_weights: Any, **names: Any
) -> int:
    """For each factor a product, and a dot product for its gradient."""
    return (3 if total_weights is None else 6) * rows[0] * rows[1]
