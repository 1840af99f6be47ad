"""Runs of the parity table in processes of their own, one for each core that is to work.

A process computes with one thread, as products this small gain little from a second one, so that a
run comes out the same however many there are beside it.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from adatape_kernels.data.parity_sequences import CLASS_NAMES
from adatape_kernels.models.model_file import serialised
from adatape_kernels.ops.op import use_backend
from adatape_kernels.recipes.devices import CPU, chosen_device
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.parity.parity_training import ParityResult, train

_SECONDS_BETWEEN_MESSAGES = 0.2


class Progress(NamedTuple):
    """How far a run is."""

    run: Run
    steps: int
    loss: float
    accuracy: float | None
    """The last one that was measured."""


class Finished(NamedTuple):
    """A run that has ended."""

    run: Run
    result: ParityResult
    model: bytes
    """A safetensors file."""


class Workplace(NamedTuple):
    """Where runs are computed."""

    jobs: int
    """Number of processes."""
    device: torch.device = CPU
    backends: tuple[str, ...] = ()
    """The backend that serves the ops, and those that serve what it does not."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    runs: Sequence[Run], config: ParityConfig, workplace: Workplace
) -> Iterator[Progress | Finished]:
    """Train in several processes; yield what becomes of the runs as it comes.

    Args:
        runs: those to train.
        config: how.
        workplace: where, and in how many processes.

    Raises:
        RuntimeError: a run failed, or its process was ended; the error names the run.
    """
    left = list(runs)
    workers: dict[Connection, tuple[BaseProcess, Run]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        while left or workers:
            while left and len(workers) < workplace.jobs:
                ours, theirs = context.Pipe()
                run = left.pop(0)
                arguments = theirs, run, config, workplace
                process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process, run
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker, run = workers[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    worker.join()
                    raise RuntimeError(
                        f"{run.stem}: expected to end, got its process ended with exit code "
                        f"{worker.exitcode}"
                    ) from None
                if isinstance(message, str):
                    raise RuntimeError(message)
                yield message
                if isinstance(message, Finished):
                    del workers[connection]
                    worker.join()
    finally:
        for worker, _ in workers.values():
            worker.kill()
            worker.join()


def _work(connection: Connection, run: Run, config: ParityConfig, workplace: Workplace) -> None:
    """Train in this process; send Progress now and then, at last Finished or what failed."""
    # An interrupt is for the process that started this one, which then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    last = time.monotonic()

    def progress(steps: int, loss: float, accuracy: float | None) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_MESSAGES or steps == config.steps:
            last = now
            connection.send(Progress(run, steps, loss, accuracy))

    # Without a reader this process has nothing to do any more.
    with contextlib.suppress(BrokenPipeError):
        try:
            name, *fallback = workplace.backends or (None,)
            device = chosen_device(workplace.device)
            with use_backend(name, fallback):
                model, result = train(run, config, progress, device)
            content = serialised(model, class_names=CLASS_NAMES, preprocessing=None)
            message: Any = Finished(run, result, content)
        except (ValueError, RuntimeError, MemoryError) as error:
            message = f"{run.stem}: {error or type(error).__name__}"
        connection.send(message)
