"""What each op asks of its arguments below the dispatcher, where everybody can call it.

A function here, or in `attention_checks.py`, has the name of an op, and takes what the op takes. It
looks at shapes, dtypes and devices, not at values. The dispatcher calls it before an implementation
that does not check for itself; csrc/op_checks.h says the same for those in C++, which do. The
public functions have checks of their own, which also hold while torch traces and say more.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.op_types import ACTIVATIONS, FFN, wide_dtype
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.reading_checks import (
    MAX_TOPK,
    MOST_ROWS,
    check_capacity,
    check_selection,
    check_widths,
)


def tape_select(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: str,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> None:
    """Raise ValueError for arguments that the op `tape_select` does not take."""
    check_selection(
        query, keys, num_tape_tokens, topk, halt_threshold, loss_type, read_mask, bank_lens
    )
    if num_tape_tokens > MOST_ROWS:
        raise ValueError(f"num_tape_tokens: expected 0 to {MOST_ROWS}, got {num_tape_tokens}")


def tape_select_bwd(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
    name: str = "keys",
) -> None:
    """Raise ValueError for arguments that the op `tape_select_bwd` does not take.

    `name` is what the caller calls the keys.
    """
    shape, dtype, device = indices.shape, query.dtype, query.device
    if len(shape) != 3 or not 1 <= shape[2] <= MAX_TOPK or indices.dtype is not torch.int32:
        raise ValueError(
            f"indices: expected int32 (batch, num_tape_tokens, 1 to {MAX_TOPK}), "
            f"got {_text(indices)}"
        )
    check_selection(query, keys, shape[1], shape[2], 0.0, loss_type, None, None, name)
    batch, wide = query.shape[:1], wide_dtype(dtype)
    check_like("indices", indices, torch.int32, (*batch, *shape[1:]), device)
    check_like("dweights", dweights, wide, shape, device)
    check_like("dponder", dponder, wide, batch, device)
    check_like("counts", counts, torch.int32, batch, device)


def tape_gather(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> None:
    """Raise ValueError for arguments that the op `tape_gather` does not take."""
    bank_shape, shape, device = bank.shape, indices.shape, bank.device
    if len(bank_shape) not in (2, 3):
        raise ValueError(f"bank: expected ([batch,] bank_size, dim), got {tuple(bank_shape)}")
    own_banks = len(bank_shape) == 3
    if len(shape) != 3 or (own_banks and bank_shape[0] != shape[0]):
        batch = bank_shape[0] if own_banks else "batch"
        raise ValueError(f"indices: expected ({batch}, num_tape_tokens, topk), got {tuple(shape)}")
    check_like("indices", indices, torch.int32, shape, device)
    check_like("weights", weights, wide_dtype(bank.dtype), shape, device)
    check_like("counts", counts, torch.int32, shape[:1], device)
    check_capacity(capacity)
    if capacity is not None and capacity > MOST_ROWS:
        raise ValueError(f"capacity: expected 0 to {MOST_ROWS} tape rows, got {capacity}")


def tape_gather_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> None:
    """Raise ValueError for arguments that the op `tape_gather_bwd` does not take."""
    tape_gather(bank, indices, weights, counts, None)
    shape = dtape.shape
    check_like("dtape", dtape, bank.dtype, (shape[0] if shape else 0, bank.shape[-1]), bank.device)


def tape_read_bwd(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
) -> None:
    """Raise ValueError for arguments that the op `tape_read_bwd` does not take."""
    check_widths(query, bank)
    tape_select_bwd(
        query,
        bank[..., : query.shape[1]],
        dweights,
        dponder,
        indices,
        counts,
        average_query,
        loss_type,
        name="bank",
    )
    tape_gather_bwd(dtape, bank, indices, weights, counts)


def dual_ffn(
    x: Tensor,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    *parameters: Tensor | None,
) -> None:
    """Raise ValueError for arguments that the op `dual_ffn` does not take."""
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, dim), got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {shown(activation)}")
    if bounds is not None:
        check_like("bounds", bounds, torch.int64, (2,), x.device)
    elif num_input_rows is None:
        raise ValueError("bounds: expected a tensor where num_input_rows is None, got None")
    given = [p for p in parameters if p is not None]
    if len(given) not in (4, 8):
        raise ValueError(
            f"tape_w1: expected all four of the tape's parameters or none, got {len(given) - 4}"
        )
    _check_ffn("", given[:4], x, gates=1)
    if len(given) == 8:
        _check_ffn("tape_", given[4:], x, gates=2)
    rows, inputs = x.shape[0], 0 if num_input_rows is None else num_input_rows
    if not (0 <= inputs <= rows and 0 <= max_tape_rows <= rows - inputs):
        raise ValueError(
            f"num_input_rows: expected 0 <= num_input_rows <= num_rows <= {rows} (the rows of x), "
            f"got {inputs} and {inputs + max_tape_rows}"
        )
    if len(given) == 4 and max_tape_rows != 0:
        raise ValueError(
            f"max_tape_rows: expected 0 without a feed-forward for the tape, got {max_tape_rows}"
        )


def dual_ffn_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: str,
    *parameters: Tensor | None,
) -> None:
    """Raise ValueError for arguments that the op `dual_ffn_bwd` does not take."""
    if tape_hidden.dim() != 2:
        raise ValueError(
            f"tape_hidden: expected (tape rows, columns), got {tuple(tape_hidden.shape)}"
        )
    tape_rows = tape_hidden.shape[0]
    dual_ffn(x, num_input_rows, tape_rows, bounds, activation, *parameters)
    dtype, device = x.dtype, x.device
    w1, _, _, _, tape_w1, *_ = parameters
    assert w1 is not None
    inputs = x.shape[0] if num_input_rows is None else num_input_rows
    check_like("dy", dy, dtype, x.shape, device)
    check_like("hidden", hidden, dtype, (inputs, w1.shape[0]), device)
    columns = tape_hidden.shape[1] if tape_w1 is None else tape_w1.shape[0]
    check_like("tape_hidden", tape_hidden, dtype, (tape_rows, columns), device)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raise ValueError for arguments that the op `add_layer_norm` does not take."""
    shape, device = x.shape, x.device
    _check_norm("x", x, weight)
    if branch.dtype not in FLOAT_DTYPES:
        raise ValueError(f"branch: expected a floating-point tensor, got {_text(branch)}")
    check_like("branch", branch, branch.dtype, shape, device)
    check_like(
        "bias", bias, bias.dtype if bias.dtype is x.dtype else torch.float32, shape[1:], device
    )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")


def add_layer_norm_bwd(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """Raise ValueError for arguments that the op `add_layer_norm_bwd` does not take."""
    shape, dtype, device = total.shape, total.dtype, total.device
    _check_norm("total", total, weight)
    check_like("dtotal", dtotal, dtype, shape, device)
    check_like("dnormed", dnormed, dtype, shape, device)
    wide = wide_dtype(dtype)
    check_like("mean", mean, wide, shape[:1], device)
    check_like("rstd", rstd, wide, shape[:1], device)


def compact_rows(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> None:
    """Raise ValueError for arguments that the op `compact_rows` does not take."""
    shape, offsets, device = data.shape, cu_inputs.shape, data.device
    if len(shape) != 2 or shape[0] > MOST_ROWS:
        raise ValueError(f"data: expected (rows up to {MOST_ROWS}, dim), got {tuple(shape)}")
    check_like("keep", keep, torch.bool, shape[:1], device)
    if len(offsets) != 1 or offsets[0] == 0:
        raise ValueError(f"cu_inputs: expected (batch + 1,), got {tuple(offsets)}")
    check_like("cu_inputs", cu_inputs, torch.int32, offsets, device)
    check_like("cu_tapes", cu_tapes, torch.int32, offsets, device)
    check_capacity(capacity)
    if capacity is not None and capacity > MOST_ROWS:
        raise ValueError(f"capacity: expected 0 to {MOST_ROWS} rows, got {capacity}")


def compact_rows_bwd(dpacked: Tensor, source: Tensor, rows: int) -> None:
    """Raise ValueError for arguments that the op `compact_rows_bwd` does not take."""
    if dpacked.dim() != 2 or dpacked.dtype not in FLOAT_DTYPES:
        raise ValueError(f"dpacked: expected floating-point (rows, dim), got {_text(dpacked)}")
    check_like("source", source, torch.int32, dpacked.shape[:1], dpacked.device)
    if not 0 <= rows <= MOST_ROWS:
        raise ValueError(f"rows: expected 0 to {MOST_ROWS}, got {rows}")


def accumulate_rows(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> None:
    """Raise ValueError for arguments that the op `accumulate_rows` does not take."""
    _check_accumulated("total", total, rows, source, weights, total_weights)


def accumulate_rows_(total: Tensor, *rest: Any) -> None:
    """Raise ValueError for arguments that the op `accumulate_rows_` does not take."""
    accumulate_rows(total, *rest)
    if total.numel() == 0:
        return
    places = sorted(each for each in zip(total.stride(), total.shape, strict=True) if each[1] > 1)
    apart = 1  # the number of elements that the smaller strides span
    for stride, size in places:
        if stride < apart:
            raise ValueError(
                "total: expected each element at a place of its own, "
                f"got strides {total.stride(0)} and {total.stride(1)}"
            )
        apart += stride * (size - 1)


def accumulate_rows_bwd(
    dsum: Tensor,
    total: Tensor | None,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
) -> None:
    """Raise ValueError for arguments that the op `accumulate_rows_bwd` does not take."""
    _check_accumulated("dsum", dsum, rows, source, weights, total_weights)
    if total is None and total_weights is not None:
        raise ValueError("total: expected a tensor beside total_weights, got None")
    if total is not None:
        check_like("total", total, dsum.dtype, dsum.shape, dsum.device)


def check_one_device(op: str, arguments: Any) -> None:
    """Raise ValueError where an op's tensors lie on several devices."""
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{op}: expected all tensors on {tensors[0].device} like the first, "
                f"got one on {tensor.device}"
            )


def refuse_unfit(schema: Sequence[Any], args: Sequence[Any]) -> None:
    """Refuse None in a tensor's place, and a tensor on another device or without strides.

    The dispatcher passes all of these on, and what then fails does not name them.

    Args:
        schema: the op's arguments, as torch describes them.
        args: what came.
    """
    device = None
    for argument, given in zip(schema, args, strict=True):
        if given is None and isinstance(argument.type, torch.TensorType):
            raise TypeError(f"{argument.name}: expected a tensor, got None")
        if isinstance(given, Tensor):
            device = device or given.device
            if given.device != device:
                raise ValueError(
                    f"{argument.name}: expected a tensor on {device}, got {given.device}"
                )
            if given.layout != torch.strided:
                raise ValueError(
                    f"{argument.name}: expected a tensor of layout torch.strided, "
                    f"got {given.layout}"
                )


def check_like(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise ValueError unless a tensor has this dtype, this shape and this device."""
    if x.shape != shape or x.dtype is not dtype or x.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, got {_text(x)} on {x.device}"
        )


def _check_accumulated(
    name: str,
    total: Tensor,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
) -> None:
    shape, dtype, device = rows.shape, rows.dtype, rows.device
    if len(shape) != 2 or dtype not in FLOAT_DTYPES:
        raise ValueError(f"rows: expected floating-point (rows, dim), got {_text(rows)}")
    if total.dim() != 2 or total.shape[0] > MOST_ROWS:
        raise ValueError(f"{name}: expected (rows up to {MOST_ROWS}, dim), got {_text(total)}")
    wide, of_total = wide_dtype(dtype), total.dtype if total.dtype is dtype else wide_dtype(dtype)
    check_like(name, total, of_total, (total.shape[0], shape[1]), device)
    check_like("source", source, torch.int32, shape[:1], device)
    check_like("weights", weights, wide, shape[:1], device)
    if total_weights is not None:
        check_like("total_weights", total_weights, wide, shape[:1], device)


def _check_norm(name: str, x: Tensor, weight: Tensor) -> None:
    shape = x.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{name}: expected (rows, dim), dim at least 1, got {tuple(shape)}")
    dtype = x.dtype if weight.dtype is x.dtype else torch.float32
    check_like("weight", weight, dtype, shape[1:], x.device)


def _check_ffn(prefix: str, ffn: list[Tensor], x: Tensor, gates: int) -> None:
    w1, dim = ffn[0], x.shape[1]
    width = w1.shape[0] // gates if w1.dim() else 0
    shapes = (gates * width, dim), (gates * width,), (dim, width), (dim,)
    for field, parameter, shape in zip(FFN._fields, ffn, shapes, strict=True):
        check_like(prefix + field, parameter, x.dtype, shape, x.device)
        # torch's products take a sparse matrix, too, and the kernels between them do not.
        if parameter.layout is not torch.strided:
            raise ValueError(
                f"{prefix}{field}: expected a tensor of layout torch.strided, "
                f"got {parameter.layout}"
            )


def _text(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
