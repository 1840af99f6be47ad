"""`accumulate_rows` in C++: csrc/cpu/accumulate_rows.cpp and csrc/cuda/accumulate_rows.cu."""

from typing import Any

from torch import Tensor

from adatape_kernels.ops.compiled_part import cpp_kernel, cuda_kernel
from adatape_kernels.ops.implementation import short


def _limits(device: Any, *args: Any) -> str | None:
    """State which rows it adds to a total of float32."""
    return _why_not(args[1])


def _limits_bwd(device: Any, *args: Any) -> str | None:
    return _why_not(args[2])


def _why_not(rows: Tensor) -> str | None:
    dtypes = cpp_forward.dtypes
    if rows.dtype in dtypes:
        return None
    return f"it takes rows of {' and '.join(map(short, dtypes))}, not {short(rows.dtype)}"


cpp_forward = cpp_kernel(_limits)
cpp_in_place = cpp_kernel(_limits)
cpp_backward = cpp_kernel(_limits_bwd)
cuda_forward = cuda_kernel()
cuda_in_place = cuda_kernel()
cuda_backward = cuda_kernel()
