"""`dual_ffn` in C++: csrc/cpu/dual_ffn.cpp on the CPU, csrc/cuda/dual_ffn.cu on a GPU."""

from typing import Any

from torch import Tensor

from adatape_kernels.ops.compiled_part import cpp_kernel, cuda_kernel
from adatape_kernels.ops.device_facts import DeviceFacts


def _serves(num_input_rows: int | None) -> str | None:
    """State which calls the two products on slices serve: the host must know where to cut."""
    return "it takes num_input_rows on the host only" if num_input_rows is None else None


def _forward_limits(
    device: DeviceFacts, x: Tensor, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


def _backward_limits(
    device: DeviceFacts, dy: Any, x: Any, h: Any, t: Any, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
cuda_forward = cuda_kernel(_forward_limits)
cuda_backward = cuda_kernel(_backward_limits)
