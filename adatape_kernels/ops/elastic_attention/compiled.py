"""`elastic_attention` in C++: csrc/cpu/elastic_attention.cpp, csrc/cuda/elastic_attention.cu."""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops.compiled_part import cpp_kernel, cuda_kernel
from adatape_kernels.ops.device_facts import DeviceFacts

CUDA_HEAD_DIM = 64


def most_rows(device: DeviceFacts) -> int:
    """Return the longest example that shared memory holds, as csrc/cuda/elastic_attention.cu does.

    Two rows of an example and two numbers stay there all the time, and two tiles of 32 rows of each
    of at least two warps.
    """
    row = 2 * CUDA_HEAD_DIM
    rest = device.shared_memory_per_block - 2 * 2 * 32 * row
    return min(512, rest // (2 * row + 8) // 16 * 16)


def _serves(device: DeviceFacts, rows: Tensor, max_rows: int | None) -> str | None:
    """State which heads and examples are served; the batch decides nothing, nor its bits."""
    head_dim, most = rows.shape[-1], most_rows(device)
    if head_dim != CUDA_HEAD_DIM:
        return f"it takes heads of {CUDA_HEAD_DIM} features, not {head_dim}"
    if max_rows is None or max_rows > most:
        given = "unknown" if max_rows is None else max_rows
        return f"it takes examples of up to {most} rows, by max_rows, which is {given}"
    return None


def _limits(device: DeviceFacts, rows: Tensor, *rest: Any) -> str | None:
    *_, max_rows, _ = rest
    return _serves(device, rows, max_rows)


_HALVES = (torch.bfloat16, torch.float16)

cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
cuda_forward = cuda_kernel(_limits, _HALVES)
cuda_backward = cuda_kernel(_limits, _HALVES)
