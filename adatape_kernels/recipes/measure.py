"""Measurements of a function on a device: its time, its FLOPs and the memory that it holds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.devices import CPU, wait
from adatape_kernels.recipes.quiet_stderr import quiet_stderr

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds that a function took: the median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """Return the timing of repetitions that took `times` seconds each."""
        fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        p20, _, _, p80 = fifths
        return cls(median(times), p20, p80)


def seconds(
    runs: Mapping[str, Run], rounds: int, warmup: int = 2, *, device: torch.device = CPU
) -> dict[str, Timing]:
    """Time functions in turn, so that a machine that is busy for a while is so for all of them.

    Args:
        runs: functions by name.
        rounds: number of times that each is timed.
        warmup: number of times that each is called before.
        device: where they compute; a GPU is waited for before and behind each.

    Raises:
        ValueError: rounds is no positive integer, or warmup a negative one.
    """
    as_integer("rounds", rounds, 1)
    as_integer("warmup", warmup, 0)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(warmup + rounds):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if repetition >= warmup:
                samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(times) for name, times in samples.items()}


def flops(run: Run) -> int:
    """Return the floating-point operations of a function's products, our ops included."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def _attention_flops(q: torch.Size, k: torch.Size, *rest: Any, **names: Any) -> int:
    batch, num_heads, queries, head_dim = q
    return 4 * batch * num_heads * queries * k[2] * head_dim


def _attention_bwd_flops(dout: Any, q: torch.Size, k: torch.Size, *rest: Any, **names: Any) -> int:
    return _attention_flops(q, k) * 5 // 2


# torch's counter knows the fused attentions of GPUs only. The names of those of the CPU are torch's
# own, so that a torch without them has its attention counted as the products that it is made of.
_CPU_ATTENTION = {
    getattr(torch.ops.aten, name): formula
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention_flops),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_bwd_flops),
    )
    if hasattr(torch.ops.aten, name)
}


def peak_bytes(run: Run, device: torch.device = CPU) -> int:
    """Return the most bytes of a device that a function holds at a time, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
