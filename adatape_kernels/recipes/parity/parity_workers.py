"""Runs of the parity table in processes of their own, one for each core that is to work."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from adatape_kernels.data.parity_sequences import CLASS_NAMES
from adatape_kernels.models.model_file import serialised
from adatape_kernels.recipes import worker_processes
from adatape_kernels.recipes.devices import CPU, chosen_device
from adatape_kernels.recipes.distributed.rank_workers import device_of_each
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.parity.parity_training import ParityResult, train
from adatape_kernels.recipes.worker_processes import Tell

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
    device = device_of_each(workplace.device)
    tasks = [(run.stem, (run, config, device)) for run in runs]
    return worker_processes.in_processes(tasks, _work, workplace.jobs, workplace.backends)


def _work(task: tuple[Run, ParityConfig, torch.device], tell: Tell) -> Finished:
    """Train in this process, and tell the progress now and then."""
    run, config, device = task
    last = time.monotonic()

    def progress(steps: int, loss: float, accuracy: float | None) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_MESSAGES or steps == config.steps:
            last = now
            tell(Progress(run, steps, loss, accuracy))

    model, result = train(run, config, progress, chosen_device(device))
    content = serialised(model, class_names=CLASS_NAMES, preprocessing=None)
    return Finished(run, result, content)
