"""`tape_read` and its gradient in C++: csrc/cpu/tape_read.cpp; the latter in csrc/cuda as well."""

from adatape_kernels.ops.compiled_part import DETERMINISTIC, cpp_kernel, cuda_kernel

cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
cuda_backward = cuda_kernel(flags=DETERMINISTIC)
