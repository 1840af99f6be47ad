"""What the forward and the backward of `add_layer_norm` in Triton share."""

import functools
from typing import Any

from torch import Tensor

from adatape_kernels.ops.device_facts import DeviceFacts
from adatape_kernels.ops.triton_runtime import triton

MAX_DIM = 4096
"""Widest row that one program holds in registers."""


def limits(device: DeviceFacts, rows: Tensor, *rest: Any) -> str | None:
    """State which calls are served: by the width of the rows that come first in both directions."""
    dim = rows.shape[1]
    return None if dim <= MAX_DIM else f"it takes rows of up to {MAX_DIM} features, not {dim}"


@functools.cache
def tile(dim: int) -> dict[str, int]:
    """Return the options of a program with 8 features a thread, which no width makes spill."""
    block_d = triton.next_power_of_2(dim)
    return {
        "BLOCK_M": max(1024 // block_d, 1),
        "BLOCK_D": block_d,
        "num_warps": max(block_d // 256, 4),
    }
