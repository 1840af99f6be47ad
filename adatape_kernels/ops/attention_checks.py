"""What the ops of attention ask of their arguments below the dispatcher, as `op_checks.py` says."""

import math

import torch
from torch import Tensor

from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops.op_checks import check_like


def elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    """Raise ValueError for arguments that the op `elastic_attention` does not take."""
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(
            f"q: expected (rows, num_heads, head_dim), head_dim at least 1, got {tuple(shape)}"
        )
    check_like("k", k, dtype, shape, device)
    check_like("v", v, dtype, shape, device)
    _check_attention_options(q, cu_inputs, cu_tapes, max_rows, softmax_scale)


def elastic_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    """Raise ValueError for arguments that the op `elastic_attention_bwd` does not take."""
    elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
    _check_attention_results(q, dout, out, lse, q.shape)


def elastic_attention_qkvpacked(
    qkv: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    """Raise ValueError for arguments that the op `elastic_attention_qkvpacked` does not take."""
    shape = qkv.shape
    if len(shape) != 4 or shape[1] != 3 or shape[3] == 0:
        raise ValueError(
            f"qkv: expected (rows, 3, num_heads, head_dim), head_dim at least 1, got {tuple(shape)}"
        )
    _check_attention_options(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale)


def elastic_attention_qkvpacked_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    """Raise ValueError for arguments that `elastic_attention_qkvpacked_bwd` does not take."""
    elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale)
    rows, _, *heads = qkv.shape
    _check_attention_results(qkv, dout, out, lse, (rows, *heads))


def _check_attention_options(
    rows: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    device = rows.device
    offsets = cu_inputs.shape
    if len(offsets) != 1 or offsets[0] == 0:
        raise ValueError(f"cu_inputs: expected (batch + 1,), got {tuple(offsets)}")
    check_like("cu_inputs", cu_inputs, torch.int32, offsets, device)
    check_like("cu_tapes", cu_tapes, torch.int32, offsets, device)
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows: expected 0 or more, got {max_rows}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")


def _check_attention_results(
    like: Tensor, dout: Tensor, out: Tensor, lse: Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse what a backward has beside the forward's arguments; `shape` is that of queries."""
    dtype, device = like.dtype, like.device
    check_like("dout", dout, dtype, shape, device)
    check_like("out", out, dtype, shape, device)
    check_like("lse", lse, wide_dtype(dtype), (shape[1], shape[0]), device)
