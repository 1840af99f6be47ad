"""`add_layer_norm` in C++ on the CPU: csrc/cpu/add_layer_norm.cpp. For a GPU, Triton has it."""

from adatape_kernels.ops.compiled_part import cpp_kernel

cpp_forward = cpp_kernel()
cpp_backward = cpp_kernel()
