"""The processes that train together, as torchrun's environment describes them."""

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.distributed.rank_watch import (
    RankWatch,
    place_of_store,
    store_of_torchrun,
)
from adatape_kernels.recipes.terminal import say

EXIT_BY_ANOTHER = 2
"""Exit code of a rank that stops because another one has failed and said why."""

Found = TypeVar("Found")

_NONE = torch.arange(0)
SECONDS_BEFORE_A_NOTE = 20.0
"""How long a rank waits for the others to begin before it says so."""
_LONGEST_WAIT = timedelta(minutes=30)
_MOST_RANKS = 1 << 20
# Of torch's DistributedDataParallel: a name that newer versions have for an option that older ones
# know by this one alone, and the layout of small gradients. Of its FSDP2: what a model returns must
# not be changed in place, as it is not here.
_NO_FAULTS = (
    "`broadcast_buffers` is deprecated",
    "Grad strides do not match",
    "FSDP2-wrapped module",
)


@dataclass(frozen=True)
class Ranks:
    """The processes that share each step, of which this is one; by default it is the only one.

    Example:
        >>> from adatape_kernels.recipes.distributed.ranks import Ranks
        >>> Ranks.of_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
        Ranks(number=1, count=2, local=1, restarts=0)
    """

    number: int = 0
    """The rank of this process, from 0 on."""
    count: int = 1
    """Number of processes on all machines together."""
    local: int = 0
    """Number of this process on its machine, by which it takes a GPU."""
    restarts: int = 0
    """How often torchrun has started all of them anew."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> "Ranks":
        """Return what torchrun has set, or a single process where it has set nothing.

        Args:
            environment: the variables; None for those of the process.

        Raises:
            ValueError: a variable is missing or no number in its range.
        """
        found = os.environ if environment is None else environment
        if "RANK" not in found or "WORLD_SIZE" not in found:
            return cls()

        def number(name: str, least: int, most: int, default: str | None = None) -> int:
            text = found.get(name, default)
            if text is None or not text.isdecimal():
                raise ValueError(f"{name}: expected a number from torchrun, got {shown(text)}")
            return as_integer(name, int(text), least, most)

        count = number("WORLD_SIZE", 1, _MOST_RANKS)
        return cls(
            number("RANK", 0, count - 1),
            count,
            number("LOCAL_RANK", 0, count - 1, "0"),
            number("TORCHELASTIC_RESTART_COUNT", 0, _MOST_RANKS, "0"),
        )

    @property
    def several(self) -> bool:
        """Whether there is another process."""
        return self.count > 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.number == 0

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, which each of them gets; it is overwritten."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, found: list[Found]) -> list[Found]:
        """Return what all ranks have found, in their order, which each of them gets."""
        if not self.several:
            return found
        of_ranks: list[Any] = [None] * self.count
        dist.all_gather_object(of_ranks, found)
        return [each for some in of_ranks for each in some]

    def of_first(self, make: Callable[[], Found]) -> Found:
        """Return what rank 0 makes, which each rank gets; the others make nothing."""
        (found,) = self.gathered([make()] if self.leads else [])
        return found

    def own(self, total: int) -> Tensor:
        """Return int64 indices of this rank's share of so many things, each count-th of them."""
        return torch.arange(self.number, total, self.count) if total > self.number else _NONE

    def check_agreement(self, found: Mapping[str, Any]) -> None:
        """Raise ValueError on every rank unless all ranks have found the same.

        No rank returns before all have called this.

        Args:
            found: what this rank has found, by the names that stand in the error; numbers, texts
                and what is made of them.
        """
        first, *others = self.gathered([dict(found)])
        for rank, other in enumerate(others, start=1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"{name}: expected the same on every rank, got {shown(first.get(name))} on "
                        f"rank 0 and {shown(other.get(name))} on rank {rank}"
                    )


ALONE = Ranks()
"""A process that shares its steps with no other."""

# What this process is among others that it has joined.
_joined: list[Ranks] = []


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, and yield which of them this is.

    Within the context all ranks but rank 0 print nothing, and another one yields the same. A group
    that the caller has started is used, and left as it is. Without torchrun this does nothing.

    Args:
        device: where this process computes, which decides between gloo and NCCL.

    Raises:
        ValueError: torchrun's variables are damaged, or several processes would share a GPU.
        KeyboardInterrupt: torchrun ends this process, as it does with all when one has died.
        SystemExit: another rank has failed, and has said why.
    """
    ranks = Ranks.of_environment()
    if not ranks.several or ranks in _joined:
        yield ranks
        return
    if device.type == "cuda":
        if device.index != ranks.local:
            raise ValueError(
                "device: expected auto or cuda under torchrun, each of whose processes has a GPU "
                f"of its own, got {device}"
            )
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        place_of_store()
    # Where rank 0 holds the store, nobody could say there that it is gone.
    watch = RankWatch(store_of_torchrun("watch", ranks.restarts), ranks.number, ranks.count)
    try:
        if ours:
            with _said_when_it_takes_long(ranks):
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=store_of_torchrun("group", ranks.restarts),
                    rank=ranks.number,
                    world_size=ranks.count,
                    timeout=_LONGEST_WAIT,
                )
        with watch, _quiet(not ranks.leads), _interruptible(), warnings.catch_warnings():
            for text in _NO_FAULTS:
                warnings.filterwarnings("ignore", text)
            _joined.append(ranks)
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        _stop(ranks, watch, error)
    finally:
        _joined.clear()
    if ours:
        gc.collect()  # what has hooks that use the group must be gone before it
        dist.destroy_process_group()


@contextlib.contextmanager
def _said_when_it_takes_long(ranks: Ranks) -> Iterator[None]:
    """Say that a rank waits for others, which nobody may have started."""
    host, port = place_of_store()
    line = (
        f"adatape-kernels: note: rank {ranks.number} of {ranks.count} waits for the others at "
        f"{printable(host, 100)}:{port}, as RANK and WORLD_SIZE say"
    )
    timer = threading.Timer(SECONDS_BEFORE_A_NOTE, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Take SIGTERM, by which torchrun ends processes, for an interruption, which says one line.

    A terminal and torchrun may both pass an interrupt on: what comes behind the first counts no
    more, as the line is still to be written.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Who starts a process in the background may have told it to ignore interrupts.
    asked = [signal.SIGTERM] + [signal.SIGINT] * callable(signal.getsignal(signal.SIGINT))

    def ignore() -> None:
        for number in asked:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(number: int, frame: object) -> NoReturn:
        ignore()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in asked}
    try:
        yield
    except BaseException:
        ignore()
        raise
    for number, handler in before.items():
        signal.signal(number, handler)


def _stop(ranks: Ranks, watch: RankWatch, error: BaseException) -> NoReturn:
    """Raise the error of the first rank that fails, and end the others without a word."""
    atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else EXIT_BY_ANOTHER)
    if not watch.report():
        raise SystemExit(EXIT_BY_ANOTHER) from None
    if _is_of_communication(error):
        raise RuntimeError(
            f"rank {ranks.number} of {ranks.count}: expected an answer of every other rank, and "
            "one is gone; --resume goes on from the last checkpoint"
        ) from None
    raise error


def _leave(code: int) -> None:
    """End the process without taking the group down, which would wait for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _is_of_communication(error: BaseException) -> bool:
    """Return whether an error says that another process could not be reached."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "Connection " in text)


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Drop what is printed."""
    if not quiet:
        yield
        return
    with contextlib.redirect_stdout(_Nowhere()), contextlib.redirect_stderr(_Nowhere()):
        yield


class _Nowhere(io.TextIOBase):
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        """Return the length of a text."""
        return len(text)

    def writable(self) -> bool:
        """Return that it takes texts."""
        return True
