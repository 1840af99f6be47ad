"""Clocks: providers take turns on inputs that no cache holds; a GPU has events and CUDA graphs."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.recipes import measure
from adatape_kernels.recipes.measure import Run, Timing

SAMPLE_SECONDS = {"cpu": 2e-3, "cuda": 2e-4}
"""A sample repeats a run until it lasts about so long, so that the clock's own step is small."""

LEAST_ROUNDS = 3
"""Each provider gets at least so many samples, however long they take."""

SLOW_SECONDS = 0.1
"""A run that takes longer is warm after one turn."""

VERY_SLOW_SECONDS = 1.0
"""A run that takes longer is warm when it has been checked, so that its first turn counts."""


def interleaved(
    runs: Mapping[str, Sequence[Run]],
    device_type: str,
    *,
    rounds: int,
    seconds: float,
    running: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time every provider in turn, so that a busy machine is busy for all of them.

    Args:
        runs: each provider's runs, one for each set of inputs, which are taken in rotation.
        device_type: "cpu" or "cuda".
        rounds: most samples of each provider.
        seconds: after so long no new round begins, save for the first few.
        running: this is told whose sample begins, outside of what is timed.
    """
    sample = _sample_cuda if device_type == "cuda" else _sample_cpu
    rotations = {name: itertools.cycle(turns) for name, turns in runs.items()}
    repeats = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, turns in runs.items():
        running(name)
        once = sample(rotations[name], len(turns))
        if once < SLOW_SECONDS:
            once = sample(rotations[name], len(turns))
        elif once > VERY_SLOW_SECONDS:
            samples[name].append(once)
        repeats[name] = max(1, min(1000, round(SAMPLE_SECONDS[device_type] / once)))
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, rotation in rotations.items():
            if len(samples[name]) <= done:
                running(name)
                samples[name].append(sample(rotation, repeats[name]))
    return {name: Timing.of(times) for name, times in samples.items()}


def _sample_cpu(runs: Iterator[Run], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        next(runs)()
    return (time.perf_counter() - start) / repeats


def _sample_cuda(runs: Iterator[Run], repeats: int) -> float:
    """Return the device's time from idle on, in which a host that launches too slowly counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        next(runs)()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def captured(run: Run) -> Run:
    """Return the run as a CUDA graph; its replay returns the tensors that the capture made.

    These are detached: a result with a `grad_fn` would keep what the capture saved for a backward.
    Each graph has memory of its own: torch refuses to capture into that of graphs that are gone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _detached(run())

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _detached(result: Any) -> Any:
    """Return a run's result with its tensors, in whatever tuples, lists or dicts, detached."""
    if isinstance(result, Tensor):
        return result.detach()
    if isinstance(result, dict):
        return {name: _detached(value) for name, value in result.items()}
    if isinstance(result, tuple | list):
        parts = [_detached(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def peak_bytes(run: Run, device_type: str) -> int:
    """Return the most memory that a run holds at a time, beyond what it started with."""
    if device_type == "cpu":
        return measure.peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cache_bytes(device_type: str) -> int:
    """Return the size of the last-level cache; 32 MiB where the system does not tell."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in "KM":
            sizes.append(int(text[:-1]) * (1024 if text[-1] == "K" else 1024**2))
    return max(sizes) or 32 * 1024**2
