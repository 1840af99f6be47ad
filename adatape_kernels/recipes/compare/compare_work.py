"""What is compared, on which images, and where and by how many processes that is done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.loading import decoded_ahead
from adatape_kernels.recipes.compare.compare_config import CompareConfig, CompareRun
from adatape_kernels.recipes.compare.compare_training import (
    TimingTask,
    TrainTask,
    looked_at,
    work,
)
from adatape_kernels.recipes.distributed.rank_workers import device_of_each
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.data_fingerprint import data_facts
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.worker_processes import in_processes


@dataclass(frozen=True)
class CompareWork:
    """A comparison whose images are read, before anything is trained."""

    config: CompareConfig
    data_dir: Path | None
    """The folder of the images; None of a set without files."""
    jobs: int
    """Number of runs at a time."""
    backends: tuple[str, ...]
    """What serves the ops where runs are trained."""
    device: torch.device
    loading: Loading
    data: ImageSet
    normalise: Normaliser
    facts: dict[str, Any]
    """By what the images are recognised."""

    @classmethod
    def of(
        cls,
        config: CompareConfig,
        data_dir: Path | None,
        jobs: int,
        backends: Sequence[str],
        device: torch.device,
        loading: Loading,
    ) -> "CompareWork":
        """Read and look at the images.

        Raises:
            ValueError, RuntimeError, OSError: as in `compare_training.looked_at`.
        """
        first = config.train_config(next(config.runs()), 1, config.limit)
        looked, normalise = looked_at(first, data_dir, loading)
        for note in looked.data.notes:
            say(f"adatape-kernels: note: {note}")
        looked.say_unreadable()
        facts = data_facts(looked.data, normalise, data_dir)
        tested = decoded_ahead(looked.data.test_images, loading.workers)
        data = replace(looked.data, test_images=tested)
        where = (data_dir, jobs, tuple(backends), device, loading)
        return cls(config, *where, data, normalise, facts)

    @property
    def runs(self) -> list[CompareRun]:
        """All runs, in their order."""
        return [*self.config.runs()]

    def line(self) -> str:
        """Return the line that says what is compared."""
        c, data = self.config, self.data
        parts = [(c.models, "model"), (c.sizes, "size"), (c.seeds, "seed")]
        product = " x ".join(f"{len(p)} {name}{'s' * (len(p) > 1)}" for p, name in parts)
        count = len(self.runs)
        return (
            f"{c.data}: {len(data.train_labels):,} training images, {len(data.test_labels):,} test "
            f"images, {data.num_classes} classes; {product} = {count} run{'s' * (count > 1)}, "
            f"{self.jobs} at a time"
        )

    def task(self, run: CompareRun, epochs: int, limit: int | None) -> TrainTask:
        """Return what a process is given to train a run.

        Args:
            run: which one.
            epochs: number of passes over the training images.
            limit: number of these; None for all.
        """
        config, device = self.config.train_config(run, epochs, limit), device_of_each(self.device)
        return TrainTask(run, config, self.data_dir, device, self.loading)

    def done(self, tasks: Sequence[tuple[str, TrainTask | TimingTask]]) -> Iterator[Any]:
        """Yield what processes tell of tasks, each with its name, as `in_processes` does."""
        yield from in_processes(tasks, work, self.jobs, self.backends)
