"""What lets kernels for a GPU run on the CPU in tests; the tests own it.

Triton's kernels run in triton's interpreter, which `conftest.py` chooses before triton is imported.
The CUDA kernels run as C++ on the host, in a library that tests/cuda_host builds.
"""

import dataclasses
import os
from pathlib import Path

import torch

CUDA_HOST = Path(__file__).parents[1] / "build/cuda_host/adatape_cuda_host.so"


def cuda_host_library():
    """Return the library to load, or None where it was not built: `make test` builds it.

    A sanitizer's build has its own, which ADATAPE_CUDA_HOST names.
    """
    path = Path(os.environ.get("ADATAPE_CUDA_HOST", CUDA_HOST))
    return path if path.exists() else None


def load_cuda_host(path):
    """Let every implementation in CUDA C++ serve the CPU, where the library has its kernels."""
    torch.ops.load_library(path)
    from adatape_kernels.ops.op import operation, registered_ops

    for name in registered_ops():
        found = operation(name).implementations.get("cuda")
        if found is not None:
            there = dataclasses.replace(found, devices=("cuda", "cpu"), absent=None)
            operation(name).replace("cuda", there)


def sum_products_in_one_order():
    """Let the interpreter add up every element of a product alike, as a GPU does.

    It would take a BLAS, which rounds some elements otherwise than others.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(builder, a, b, d, *precision):
        product = np.einsum("...ij,...jk->...ik", a.data, b.data, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = dot


def exponential_of_a_gpu(units):
    """Return an `InterpreterBuilder.create_exp` as wrong as an NVIDIA GPU's is allowed to be.

    Triton makes exp(x) of float32 of the instruction ex2.approx.f32, 2 to the power of a number,
    which is the rounded product x · log2(e). PTX allows the instruction 2 units in the last place.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_exp

    def exp(builder, x):
        if x.data.dtype != np.float32:
            return exact(builder, x)
        power = np.exp2((x.data * np.float32(1.4426950408889634)).astype(np.float64))
        return TensorHandle((power * (1 + units * 2.0**-23)).astype(np.float32), x.dtype.scalar)

    return exp
