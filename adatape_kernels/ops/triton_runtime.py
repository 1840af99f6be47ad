"""Triton as the rooms use it: `triton`, `tl`, and `launch`, the one way to start a kernel.

Without triton the rooms still import: their kernels are defined, and `kernel` says that triton is
absent. With TRITON_INTERPRET=1 in the environment kernels run on the CPU, in triton's interpreter.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from adatape_kernels.ops.device_facts import DeviceFacts, too_old
from adatape_kernels.ops.implementation import HALF_AND_FLOAT, Implementation, Statement
from adatape_kernels.ops.triton_start import why_triton_cannot_start

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
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cuda": HALF_AND_FLOAT}
"""By the devices whose tensors Triton's kernels take, the dtypes of these."""

if INTERPRETED:
    # bfloat16 arithmetic is silently wrong in the interpreter.
    DTYPES["cpu"] = (torch.float32, torch.float16)


def kernel(limits: Statement | None = None) -> Callable[[Callable[..., Any]], Implementation]:
    """Make the decorated launcher an implementation that serves where Triton's kernels run.

    `limits` states what else it asks of a call, as in `Implementation`.
    """
    absent = None if INSTALLED else "triton is not installed"
    return lambda launcher: Implementation(
        launcher, tuple(DTYPES), DTYPES, limits, absent, device_limits=_device_limits
    )


def _device_limits(facts: DeviceFacts) -> str | None:
    """State on which GPUs the kernels run, and that Triton must be able to start them there."""
    return too_old(facts) or (why_triton_cannot_start() if _starts_kernels() else None)


def _starts_kernels() -> bool:
    """Return whether Triton starts kernels in this process: not where it interprets them."""
    return not INTERPRETED and torch.cuda.is_available()


class Launch(NamedTuple):
    """A kernel with what it was called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name: tensors, numbers or tuples of them, constexpr arguments, and launch options."""


class _Recorded(NamedTuple):
    launches: list[Launch]
    runs: bool


_recorded: _Recorded | None = None


@contextlib.contextmanager
def recording(*, run: bool = False) -> Iterator[list[Launch]]:
    """Collect launches, of tensors of any device, "meta" included.

    They do not run, so that kernels can be compiled ahead of time for their arguments; with `run`
    they are collected and run.
    """
    global _recorded
    outer, _recorded = _recorded, _Recorded([], run)
    try:
        yield _recorded.launches
    finally:
        _recorded = outer


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Run a kernel over a grid, on the device of its tensors; an empty grid runs nothing.

    `arguments` are the kernel's, by name, the first a tensor, and the options num_warps, num_stages
    and maxnreg. The other two have no names, with which Python would compare each of these.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.launches.append(Launch(kernel, grid, arguments))
        if not _recorded.runs:
            return
    first = next(iter(arguments.values()))
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](**arguments)
    else:  # entering a device takes longer than all else here
        kernel[grid](**arguments)


def num_blocks(size: int, block: int) -> int:
    """Return how many blocks cover so many elements, sooner than `triton.cdiv` does."""
    return -(-size // block)
