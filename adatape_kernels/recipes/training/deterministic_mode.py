"""Torch's deterministic algorithms, with which all training runs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Run with torch's deterministic algorithms.

    Without them a sum whose addends two threads compute, such as the gradient of a bank, may be
    added in another order on each run, and two equal runs differ in the last bit.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # mypy does not know the property of this module
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill new memory with NaN, to show bugs, which takes time.
    memory.fill_uninitialized_memory = before and fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
