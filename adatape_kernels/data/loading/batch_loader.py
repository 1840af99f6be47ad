"""The batches of an epoch in their order, prepared here or ahead of training by workers."""

import gc
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from adatape_kernels.arguments import check_int, shown
from adatape_kernels.data.loading.batch_maker import BatchMaker, BatchPlace, PreparedBatch
from adatape_kernels.data.loading.loading_times import LoadingTimes
from adatape_kernels.data.loading.unreadable_images import UnreadableImages
from adatape_kernels.data.printable import printable

MOST_WORKERS = 1024
PREFETCH = 2
"""Number of batches that each worker prepares ahead."""
_STARTS = ("fork", "spawn", "forkserver")
# What an image that cannot be decoded or a package that is missing raises.
_EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)

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
        self.maker = maker
        self.workers = check_int("workers", workers, 0, MOST_WORKERS)
        if start is not None and start not in _STARTS:
            raise ValueError(f"start: expected {', '.join(_STARTS)} or None, got {shown(start)}")
        self.pinned, self.start, self.unreadable = pinned, start, unreadable
        self.times = LoadingTimes(self.workers)
        """Those of the epoch that was begun last."""
        self._places = _Places(maker.batches)
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The frames that an error passed hold torch's iterator, and with it the processes.
        traceback.clear_frames(trace)
        self.close()

    def close(self) -> None:
        """End the worker processes, of which torch waits for each, and close their pipes."""
        self._iterator = None
        if self._loader is not None:
            self._loader = None
            # torch's queues refer to themselves, and their pipes would stay open for a while.
            gc.collect()

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
        self._iterator = self._prepared() if self.workers == 0 else self._received()
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
        assert self._iterator is not None
        if self.workers == 0:
            return next(self._iterator)
        try:
            found = next(self._iterator)
        except (RuntimeError, EOFError, OSError) as error:
            # What a worker meets is a _Failure; this is the end of one that the system killed.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            reason = (str(error).strip().splitlines() or ["one that was ended"])[0]
            raise RuntimeError(
                "workers: expected processes that prepare every batch, got "
                f"{printable(reason, 200)}"
            ) from None
        if isinstance(found, _Failure):
            raise found.kind(found.message)
        return found

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

    def _received(self) -> Iterator[Any]:
        """Return torch's iterator over an epoch, whose workers stay for the next one."""
        with warnings.catch_warnings():
            # torch warns of more processes than cores, which is for the user to choose.
            warnings.simplefilter("ignore", UserWarning)
            if self._loader is None:
                self._loader = DataLoader(
                    _Guarded(self.maker),
                    batch_size=None,
                    sampler=self._places,
                    num_workers=self.workers,
                    collate_fn=_as_it_is,
                    pin_memory=self.pinned,
                    worker_init_fn=_ignore_interrupts,
                    multiprocessing_context=self.start,
                    # torch would draw a seed for the workers from its default generator.
                    generator=Generator(),
                    prefetch_factor=PREFETCH,
                    persistent_workers=True,
                )
            return iter(self._loader)


class _Places:
    """What is asked for: each batch of an epoch, or a part of it."""

    def __init__(self, batches: int):
        self.epoch, self.batches = 0, batches
        self.part: Part = _whole

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[BatchPlace]:
        return (BatchPlace(self.epoch, batch, self.part(batch)) for batch in range(self.batches))


@dataclass(frozen=True)
class _Failure:
    """An error of a worker, whose message is one line; torch would pass it on with a traceback."""

    kind: type[Exception]
    message: str


class _Guarded(Dataset[Any]):
    """A maker whose errors are results."""

    def __init__(self, maker: BatchMaker):
        self.maker = maker

    def __getitem__(self, place: BatchPlace) -> PreparedBatch | _Failure:
        try:
            return self.maker[place]
        except _EXPECTED as error:
            kind = next(each for each in _EXPECTED if isinstance(error, each))
            return _Failure(kind, str(error) or type(error).__name__)


def _as_it_is(found: Any) -> Any:
    """Return what a worker prepared, which is a batch already."""
    return found


def _ignore_interrupts(worker: int) -> None:
    """Leave an interrupt to the process that started this one, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
