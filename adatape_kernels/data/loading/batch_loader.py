"""The batches of an epoch in their order, prepared here or ahead of training by workers."""

from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from adatape_kernels.data.loading.batch_maker import BatchMaker, BatchPlace, PreparedBatch
from adatape_kernels.data.loading.guarded_workers import GuardedWorkers
from adatape_kernels.data.loading.loading_times import LoadingTimes
from adatape_kernels.data.loading.unreadable_images import UnreadableImages

Part = Callable[[int], Tensor | None]
"""Returns the positions that are asked for of a batch, given its number; None for all of it."""


def _whole(batch: int) -> None:
    """Ask for all of a batch."""


class BatchLoader:
    """Has the batches of epochs prepared; a context, behind which no process is left.

    A batch is the same whoever prepares it, since it is computed with one thread everywhere.

    Args:
        maker: prepares a batch from its number.
        workers: number of processes that prepare batches; 0 for none but this one.
        pinned: whether batches lie in memory that a GPU copies from while the host goes on.
        start: how processes begin, "fork", "spawn" or "forkserver"; None for the system's way.
        unreadable: counts the images that the maker left out.

    Raises:
        ValueError: workers is out of range, or start is no such way.

    Example:
        >>> import torch
        >>> from adatape_kernels.data import Normaliser
        >>> from adatape_kernels.data.loading import BatchLoader, BatchMaker
        >>> images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1])
        >>> maker = BatchMaker(
        ...     images,
        ...     labels,
        ...     num_classes=2,
        ...     batch=2,
        ...     batches=3,
        ...     seed=0,
        ...     normalise=Normaliser((0.5,), (0.25,)),
        ...     make_augment=lambda: lambda images, generator: images,
        ... )
        >>> with BatchLoader(maker) as loader:
        ...     [len(batch.targets) for batch in loader.epoch(0)]
        [2, 2, 1]
    """

    def __init__(
        self,
        maker: BatchMaker,
        workers: int = 0,
        *,
        pinned: bool = False,
        start: str | None = None,
        unreadable: UnreadableImages | None = None,
    ):
        self.maker, self.unreadable = maker, unreadable
        self._places = _Places(maker.batches)
        self._processes = GuardedWorkers(maker, self._places, workers, pinned=pinned, start=start)
        self.workers = self._processes.workers
        self.times = LoadingTimes(self.workers)
        """Those of the epoch that was begun last."""
        self._here: Iterator[PreparedBatch] | None = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._here = None
        self._processes.__exit__(kind, error, trace)

    def close(self) -> None:
        """End the worker processes."""
        self._here = None
        self._processes.close()

    def epoch(self, epoch: int, part: Part = _whole) -> Iterator[PreparedBatch]:
        """Yield the batches of an epoch in their order, or a part of each.

        Args:
            epoch: its number, from 0 on.
            part: the part that this process trains on, where several share a batch; it is called
                in this process for each batch, some batches ahead.

        Raises:
            ValueError: an image cannot be read, or more than the limit; the error names the file.
            RuntimeError: a package is missing, or a worker process was ended.
            OSError, MemoryError: what a worker met.
        """
        self._places.epoch, self._places.part = epoch, part
        if self.workers == 0:
            self._here = self._prepared()
        else:
            self._processes.begin()
        self.times = LoadingTimes(self.workers)
        for _ in range(self.maker.batches):
            self.times.ask()
            batch = self._next()
            self.times.receive(len(batch.targets), batch.seconds)
            if self.unreadable is not None:
                self.unreadable.add(batch.unreadable)
            yield batch
        self.times.stop()

    def _next(self) -> PreparedBatch:
        return self._processes.next() if self._here is None else next(self._here)

    def _prepared(self) -> Iterator[PreparedBatch]:
        """Yield batches that this process prepares when they are asked for."""
        for place in self._places:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                batch = self.maker[place]
            finally:
                torch.set_num_threads(threads)
            yield batch


class _Places:
    """What is asked for: each batch of an epoch, or a part of it."""

    def __init__(self, batches: int):
        self.epoch, self.batches = 0, batches
        self.part: Part = _whole

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchPlace]:
        return (BatchPlace(self.epoch, batch, self.part(batch)) for batch in range(self.batches))
