"""Triton as the op files use it: `triton`, `tl`, and `launch`, the one way to start a kernel.

Without triton the op files still import: their kernels are defined, and the backend says that it is
absent. With TRITON_INTERPRET=1 in the environment kernels run on the CPU, in triton's interpreter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows and macOS have no triton

    class _Stub:
        """What a kernel's definition needs of the two modules, and no more."""

        constexpr = None

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function or (lambda kernel: kernel)

    triton = tl = _Stub

INSTALLED = triton.__name__ == "triton"
INTERPRETED = bool(INSTALLED and triton.knobs.runtime.interpret)
# bfloat16 arithmetic is silently wrong in the interpreter.
DTYPES = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

if INTERPRETED:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def _dot(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        """Sum every element in the same order, as a GPU does; a BLAS rounds some otherwise."""
        product = np.einsum("...ij,...jk->...ik", a.data, b.data, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = _dot


class Launch(NamedTuple):
    """A kernel with what it was called with: tensors, numbers or tuples of them, and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, for tensors of any device, "meta" included."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel over a grid, on the device of its first argument; an empty grid runs nothing.

    `options` are the kernel's constexpr arguments, num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    device = args[0].device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options)


def vector(*tensors: torch.Tensor) -> int:
    """Return the elements of a 16-byte access if all rows begin and end at one, else 1."""
    elements = 16 // tensors[0].element_size()
    steps = [step for x in tensors for step in (x.shape[-1], *x.stride()[:-1])]
    return 1 if any(step % elements for step in steps) else elements


def in_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy whose rows are extended by zeros to whole 16-byte vectors."""
    dense = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    if dense and vector(tensor) > 1:
        return tensor
    missing = -tensor.shape[-1] % (16 // tensor.itemsize)
    return torch.nn.functional.pad(tensor, (0, missing)).contiguous()
