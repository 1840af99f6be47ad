"""Attention over short examples in CUDA C++, and who takes the rest.

The kernels of csrc/cuda/elastic_attention.cu keep an example in shared memory: they serve heads of
64 in float16 and bfloat16, and examples that `max_rows` bounds by what fits. Whether they serve
follows from these alone, never from the batch, so that an example's bits do not either.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.backend import explain, implementation
from adatape_kernels.elastic import check_examples

HEAD_DIM = 64


@functools.cache
def most_rows(device: torch.device) -> int:
    """Return the longest example that a block's shared memory holds, with room for the backward."""
    if device.type == "cuda":
        shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        return 512 if shared >= 164 * 1024 else 256
    return 512


def served(q: Tensor, max_rows: int | None) -> bool:
    """Whether the CUDA kernels take such heads and examples."""
    fits = max_rows is not None and max_rows <= most_rows(q.device)
    return fits and q.shape[2] == HEAD_DIM and q.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _other(op: str, device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """Return who serves what the CUDA kernels do not."""
    reasons = explain(op, device_type, dtype)
    return implementation(op, "triton" if reasons["triton"] == "serves" else "eager")


def cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse."""
    args = q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale
    if not served(q, max_rows):
        return _other("elastic_attention", q.device.type, q.dtype)(*args)
    if q.device.type == "cpu":  # where looking costs no copy
        check_examples(cu_inputs, cu_tapes, len(q), max_rows)
    return torch.ops.adatape_cuda.elastic_attention(*args)


def cuda_attention_bwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    args = dout, q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, softmax_scale
    if not served(q, max_rows):
        return _other("elastic_attention_bwd", q.device.type, q.dtype)(*args)
    return torch.ops.adatape_cuda.elastic_attention_bwd(*args)
