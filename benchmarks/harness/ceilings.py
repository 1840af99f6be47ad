"""The machine's own ceilings, measured before anything else: a large copy, a large product."""

import functools
import time
from dataclasses import dataclass

import torch

from adatape_kernels.benchmarks.harness import records, timing

COPIED = {"cpu": 256 * 1024**2, "cuda": 1024**3}
"""The copied buffer has so many bytes, far more than a cache holds."""

SIDES = {"cpu": (256, 2048), "cuda": (8192, 8192)}
"""The side of the square factors, at least and at most; it doubles until a product takes 50 ms."""


@dataclass(frozen=True)
class Ceilings:
    """The rates of the copy and of the product, and the rows that record them."""

    bytes_per_s: float
    """Bytes that the copy reads count, and those that it writes."""
    flops_per_s: float
    rows: tuple[records.ResultRow, ...]

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time that so much work takes on this machine."""
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


@functools.cache
def measured(device_type: str, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Measure both in a dtype; a process measures each dtype once."""
    rounds, seconds = (5, 0.5) if quick else (15, 3.0)
    source = torch.ones(COPIED[device_type] // dtype.itemsize, dtype=dtype, device=device_type)
    target = torch.empty_like(source)
    a, b = _factors(device_type, dtype)
    found = timing.interleaved(
        {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]},
        device_type,
        rounds=rounds,
        seconds=seconds,
    )
    moved, flops = 2 * source.numel() * dtype.itemsize, 2 * len(a) ** 3
    name = records.dtype_name(dtype)
    shapes = {"copy": f"bytes={moved // 2}", "product": f"side={len(a)}"}
    rows = tuple(
        records.row(
            records.CaseKey("ceiling", which, name, shapes[which]),
            "torch",
            device_type,
            timing=each,
            flops=flops if which == "product" else None,
            moved=moved if which == "copy" else None,
            limit_s=each.median,
        )
        for which, each in found.items()
    )
    return Ceilings(moved / found["copy"].median, flops / found["product"].median, rows)


def _factors(device_type: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Make two factors, which stay small where products of this dtype are slow."""
    side, most = SIDES[device_type]
    while True:
        a, b = torch.randn(2, side, side, device=device_type).to(dtype).unbind(0)
        start = time.perf_counter()
        a @ b
        if side == most or time.perf_counter() - start > 0.05:
            return a, b
        side *= 2
