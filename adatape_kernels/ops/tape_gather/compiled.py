"""`tape_gather` in C++: csrc/cpu/tape_gather.cpp on the CPU, csrc/cuda/tape_gather.cu on a GPU."""

from adatape_kernels.ops.compiled_part import DETERMINISTIC, cpp_kernel, cuda_kernel

cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
cuda_forward = cuda_kernel()
cuda_backward = cuda_kernel(flags=DETERMINISTIC)
