"""What a Triton kernel's compiled form may depend on: dtypes, sizes of the model, nothing else.

Triton compiles a kernel again for each class of integers (1, multiples of 16, others) and of
addresses (multiples of 16, others), and lays out its blocks otherwise. So a step would wait for the
compiler whenever a number of rows first falls into another class, and an example's sums would be
added up in another order wherever its rows begin at another place. Here a kernel says which
arguments it is compiled for, and its launcher copies a tensor that lies otherwise.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops.triton_runtime import tl, triton

ALIGNMENT = 16
"""Bytes of the widest access of a thread, and of the class of addresses that Triton knows."""


def compiled_for(*, aligned: tuple[str, ...] = (), sizes: tuple[str, ...] = ()) -> Callable:
    """Make the decorated function a Triton kernel with as few compiled forms as it can have.

    Args:
        aligned: the names of its pointers, or tuples of them, that its launcher only gives at
            multiples of 16 bytes: see `with_dense_rows` and `dense`. Of others Triton assumes
            nothing.
        sizes: the names of integers that are the model's own, like its width, for whose class the
            kernel is compiled. Of others Triton knows nothing.
    """

    def compiled(function: Callable[..., None]) -> Any:
        pointers: list[str] = []
        integers: list[str] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.annotation is tl.constexpr or name in (*aligned, *sizes):
                continue
            (pointers if name.endswith(("_ptr", "_ptrs")) else integers).append(name)
        return triton.jit(
            function, do_not_specialize=integers, do_not_specialize_on_alignment=pointers
        )

    return compiled


def elements_per_access(*tensors: Tensor) -> int:
    """Return the elements of a 16-byte access if rows of these widths consist of such, else 1."""
    elements = ALIGNMENT // tensors[0].element_size()
    for x in tensors:
        if x.shape[-1] % elements:
            return 1
    return elements


def dense(x: Tensor) -> Tensor:
    """Return the tensor, or a copy that is contiguous and begins at a multiple of 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def with_dense_rows(x: Tensor, elements: int | None = None) -> Tensor:
    """Return the tensor, or a dense copy, whose rows kernels can read by whole accesses.

    The last dimension is contiguous, and every row begins at a multiple of `elements`: by default
    those of an access of 16 bytes if the rows consist of such, else 1.
    """
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    elements = elements_per_access(x) if elements is None else elements
    *steps, last = x.stride()
    aligned = x.data_ptr() % ALIGNMENT == 0 and not any(step % elements for step in steps)
    return x if last == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def in_whole_accesses(x: Tensor) -> Tensor:
    """Return the tensor, or a copy whose rows are extended by zeros to whole 16-byte accesses."""
    if elements_per_access(x) > 1:
        return with_dense_rows(x)
    missing = -x.shape[-1] % (ALIGNMENT // x.itemsize)
    return torch.nn.functional.pad(x, (0, missing)).contiguous()


def bank_strides(bank: Tensor, elements: int = 1) -> tuple[int, int]:
    """Return the steps through a bank ([batch,] bank_size, width), counted in so many elements.

    The first leads from example to example, and is 0 if they share the bank; the second from entry
    to entry.
    """
    strides = bank.stride()
    of_examples = strides[0] // elements if len(strides) == 3 else 0
    return of_examples, strides[-2] // elements
