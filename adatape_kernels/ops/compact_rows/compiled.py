"""`compact_rows` in C++: csrc/cpu/compact_rows.cpp and csrc/cuda/compact_rows.cu."""

from adatape_kernels.ops.compiled_part import cpp_kernel, cuda_kernel

cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
cuda_forward = cuda_kernel()
cuda_backward = cuda_kernel()
