"""Work shared among processes that all use the same device."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

MOST_JOBS = 12
"""Each process has a context on the GPU, of half a gigabyte."""

START_METHOD = "spawn"
"""A process that has used a GPU cannot be forked."""

_T = TypeVar("_T")


def jobs_for(device: str) -> int:
    """Return how many processes are worth starting on this machine, and one on a CPU."""
    return 1 if device == "cpu" else jobs_of_cores(len(os.sched_getaffinity(0)))


def jobs_of_cores(cores: int) -> int:
    """Return how many processes keep so many cores busy with compiling: three for every four."""
    return max(1, min(MOST_JOBS, cores * 3 // 4))


def in_processes(
    prepare: Callable[[str], None], work: Callable[[int], _T], device: str, number: int, jobs: int
) -> Iterator[_T | None]:
    """Call work(0) to work(number - 1) in several processes; yield the results in order.

    Each process calls prepare(device) first. None stands for work whose process has died, as a
    fault of a kernel may bring about. After the first such fault one process does the rest, so that
    it is known which work it was.
    """
    left = list(range(number))
    while left:
        context = multiprocessing.get_context(START_METHOD)
        with ProcessPoolExecutor(jobs, context, prepare, (device,)) as pool:
            futures = [pool.submit(work, each) for each in left]
            try:
                for future in futures:
                    result = future.result()
                    del left[0]
                    yield result
            except BrokenProcessPool:
                if jobs == 1:
                    del left[0]
                    yield None
                jobs = 1
            finally:  # an interrupted program does not wait for what has not begun
                pool.shutdown(wait=False, cancel_futures=True)
