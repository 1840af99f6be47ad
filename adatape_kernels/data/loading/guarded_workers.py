"""torch's DataLoader workers, which return what is asked for, and whose errors are one line."""

import gc
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from adatape_kernels.arguments import check_int, shown
from adatape_kernels.data.printable import printable

MOST_WORKERS = 1024
PREFETCH = 2
"""How much each worker prepares ahead, in what is asked for at a time."""
_STARTS = ("fork", "spawn", "forkserver")
# What an image that cannot be decoded or a package that is missing raises.
_EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)


class Source(Protocol):
    """What workers take out of."""

    def __getitem__(self, asked: Any, /) -> Any:
        """Return what is asked for."""
        ...


class GuardedWorkers:
    """Processes that return parts of a source in order; a context, behind which none is left.

    They begin when the first pass begins, and stay until the context ends.

    Args:
        source: what they take out of; where processes are spawned, something that pickle takes.
        asked: what they are asked for, in this order; looked at anew for each pass.
        workers: number of processes, 1 or more.
        pinned: whether results lie in memory that a GPU copies from while the host goes on.
        start: how processes begin, "fork", "spawn" or "forkserver"; None for the system's way.

    Raises:
        ValueError: workers is out of range, or start is no such way.
    """

    def __init__(
        self,
        source: Source,
        asked: Iterable[Any],
        workers: int,
        *,
        pinned: bool = False,
        start: str | None = None,
    ):
        self.source, self.asked = source, asked
        self.workers = check_int("workers", workers, 0, MOST_WORKERS)
        if start is not None and start not in _STARTS:
            raise ValueError(f"start: expected {', '.join(_STARTS)} or None, got {shown(start)}")
        self.pinned, self.start = pinned, start
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None

    def __enter__(self) -> "GuardedWorkers":
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
        # torch raises the end of a process wherever this one is by then, in a step of training too.
        if error is not None and _is_end_of_worker(error):
            raise _worker_ended(error) from None

    def close(self) -> None:
        """End the worker processes, of which torch waits for each, and close their pipes."""
        self._iterator = None
        if self._loader is not None:
            self._loader = None
            # torch's queues refer to themselves, and their pipes would stay open for a while.
            gc.collect()

    def begin(self) -> None:
        """Begin a pass over what is asked for; the one before must have come to its end."""
        with warnings.catch_warnings():
            # torch warns of more processes than cores, which is for the user to choose.
            warnings.simplefilter("ignore", UserWarning)
            if self._loader is None:
                self._loader = DataLoader(
                    _Guarded(self.source),
                    batch_size=None,
                    sampler=self.asked,
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
            self._iterator = iter(self._loader)

    def next(self) -> Any:
        """Return the next part of the pass.

        Raises:
            ValueError, OSError, MemoryError: what a worker met.
            RuntimeError: that too, or a worker process was ended.
        """
        assert self._iterator is not None
        try:
            found = next(self._iterator)
        except (RuntimeError, EOFError, OSError) as error:
            # What a worker meets is a _Failure; this is the end of one that the system killed.
            if isinstance(error, RuntimeError) and not _is_end_of_worker(error):
                raise
            raise _worker_ended(error) from None
        if isinstance(found, _Failure):
            raise found.kind(found.message)
        return found


@dataclass(frozen=True)
class _Failure:
    """An error of a worker, whose message is one line; torch would pass it on with a traceback."""

    kind: type[Exception]
    message: str


class _Guarded(Dataset[Any]):
    """A source whose errors are results."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, asked: Any) -> Any:
        try:
            return _in_shared_memory(self.source[asked])
        except _EXPECTED as error:
            kind = next(each for each in _EXPECTED if isinstance(error, each))
            return _Failure(kind, str(error) or type(error).__name__)


def _in_shared_memory(found: Any) -> Any:
    """Return what a worker prepared with its tensors where the other process reads them.

    torch would bring them there in a thread whose errors nobody hears of, and training would wait
    for the batch for ever.

    Raises:
        RuntimeError: there is no room for them.
    """
    for tensor in [found] if isinstance(found, Tensor) else found:
        if isinstance(tensor, Tensor) and tensor.numel():
            try:
                tensor.share_memory_()
            except RuntimeError as error:
                reason = (str(error).splitlines() or ["none"])[0].rpartition(": ")[2]
                raise RuntimeError(
                    f"workers: expected room for {tensor.nbytes:,} bytes in /dev/shm, got "
                    f"{printable(reason, 200)}; fewer workers or a smaller batch need less"
                ) from None
    return found


def _is_end_of_worker(error: BaseException) -> bool:
    """Return whether torch says by an error that a worker process is no more."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _worker_ended(error: BaseException) -> RuntimeError:
    """Return the error that says so in the form that all errors have."""
    reason = (str(error).strip().splitlines() or ["one that was ended"])[0]
    return RuntimeError(
        f"workers: expected processes that prepare every batch, got {printable(reason, 200)}"
    )


def _as_it_is(found: Any) -> Any:
    """Return what a worker prepared, which is a batch already."""
    return found


def _ignore_interrupts(worker: int) -> None:
    """Leave an interrupt to the process that started this one, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
