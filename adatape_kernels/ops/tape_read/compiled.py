"""The gradient of `tape_read` in C++: csrc/cpu/tape_read.cpp and csrc/cuda/tape_read.cu."""

from adatape_kernels.ops.compiled_part import DETERMINISTIC, cpp_kernel, cuda_kernel

cpp_backward = cpp_kernel()
cuda_backward = cuda_kernel(flags=DETERMINISTIC)
