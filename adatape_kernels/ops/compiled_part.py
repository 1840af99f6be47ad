"""The compiled part as the rooms use it: which kernels csrc has, or why they are not here.

Importing `adatape_kernels._C` registers the kernels for the ops that `op.CompiledKernel` declares.
"""

from collections.abc import Callable, Mapping

import torch

from adatape_kernels._build import build_facts
from adatape_kernels.ops.device_facts import too_old
from adatape_kernels.ops.implementation import HALF_AND_FLOAT, CompiledKernel, Statement

FACTS = build_facts()


def cpp_kernel(limits: Statement | None = None) -> CompiledKernel:
    """Return the implementation of csrc/cpu for an op: on the CPU, with every check of its own.

    `limits` states what else it asks of a call, as in `Implementation`.
    """
    absent = None if FACTS["compiled"] == "yes" else FACTS["why"]
    kinds = ("cpu",), HALF_AND_FLOAT
    return CompiledKernel("adatape_cpu", *kinds, absent, limits, checks_values=True)


def cuda_kernel(
    limits: Statement | None = None,
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT,
    flags: Mapping[str, Callable[[], bool]] | None = None,
) -> CompiledKernel:
    """Return the implementation of csrc/cuda for an op; the arguments as in `CompiledKernel`."""
    return CompiledKernel(
        "adatape_cuda",
        ("cuda",),
        dtypes,
        _why_no_cuda(),
        limits,
        device_limits=too_old,
        flags=flags,
    )


def _why_no_cuda() -> str | None:
    if FACTS["compiled"] != "yes":
        return FACTS["why"]
    cuda = FACTS["cuda"]
    return cuda.removeprefix("none: ") if cuda.startswith("none") else None


DETERMINISTIC = {"deterministic": torch.are_deterministic_algorithms_enabled}
"""For backwards whose sums csrc/cuda can add up in a fixed order, so that equal input gives equal
bits, or faster in any."""
