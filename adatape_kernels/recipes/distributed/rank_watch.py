"""A thread of each rank that ends the process when another rank is gone.

torchrun sees a process of its own machine die, and gloo sees a connection close. Neither helps
with a machine that lost its power or with NCCL, which waits for minutes. So each rank counts up a
number in torchrun's store every few seconds and looks at that of the next rank, and the first that
fails says so there.
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.distributed import last_words
from adatape_kernels.recipes.quiet_stderr import quiet_stderr

BEAT_SECONDS = 3.0
"""How often each rank says that it is alive, and looks whether the others are."""
PATIENCE_SECONDS = 40.0
"""How long a rank may be silent. With the beat, and a look at the store, it is below a minute."""

EXIT_BY_ANOTHER = 2
"""Exit code of a rank that ends because another one has failed and said why."""

_MOST_PORT = 65535
_SECONDS_TO_CONNECT = 30
# One that has failed already asks for no more than whether it is the first.
_SECONDS_TO_CONNECT_AT_LAST = 5
_FAILED = "failed"
# For how long the main thread may already have been ending when the store goes, and may be saying
# why the process ends.
_SECONDS_TO_END, _SECONDS_TO_SPEAK = 2.0, 5.0

WATCH = "watch"
"""What the watch's part of torchrun's store is for, as `store_of_torchrun` has it."""


def store_of_torchrun(
    purpose: str, restarts: int | None = None, seconds: float = _SECONDS_TO_CONNECT
) -> Any:
    """Return a connection to torchrun's own store, or None where rank 0 is to hold one.

    Args:
        purpose: begins the names of what is stored.
        restarts: how often torchrun has started the processes anew, which begins them too: its
            store may still hold what those before have written. None for what all starts share.
        seconds: how long it is tried to reach it.

    Raises:
        ValueError: a variable that says where the store is, is missing or damaged.
        RuntimeError: nothing answers there.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = place_of_store()
    patience = timedelta(seconds=seconds)
    try:
        with quiet_stderr():  # torch's library notes every attempt
            store = dist.TCPStore(host, port, None, False, timeout=patience)
    except RuntimeError:
        raise RuntimeError(
            f"MASTER_ADDR: expected torchrun's store at {printable(host, 100)}:{port}, got no "
            f"answer within {seconds:g} seconds"
        ) from None
    start = "" if restarts is None else f"{restarts}/"
    return dist.PrefixStore(f"adatape-kernels/{start}{purpose}", store)


def is_first_to_fail(number: int, restarts: int) -> bool:
    """Tell all ranks that this one has failed; return whether it is the first that does.

    This is for a rank that may not have joined the others yet, as where its options are wrong.

    Args:
        number: the rank of this process.
        restarts: how often torchrun has started all of them anew.
    """
    try:
        store = store_of_torchrun(WATCH, restarts, _SECONDS_TO_CONNECT_AT_LAST)
        return store is None or _is_first(store, number)
    except (RuntimeError, ValueError):  # nobody is there with whom it could tell
        return True


def _is_first(store: Any, number: int) -> bool:
    mine = str(number)
    first = store.compare_set(_FAILED, "", mine)
    return bool(first.decode() == mine)


def place_of_store() -> tuple[str, int]:
    """Return the host and the port at which ranks find each other.

    Raises:
        ValueError: a variable that says so is missing or damaged.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host:
        raise ValueError(f"MASTER_ADDR: expected a host from torchrun, got {shown(host)}")
    if port is None or not port.isdecimal() or not 1 <= int(port[:9]) <= _MOST_PORT:
        raise ValueError(f"MASTER_PORT: expected a port from torchrun, got {shown(port)}")
    return host, int(port)


class RankWatch:
    """Watches the next rank while its context lasts, and stops the process where it is gone.

    Args:
        store: what all ranks read and write, or None where there is none, so that nothing is
            watched. No other thread may use it.
        number: the rank of this process.
        count: number of processes.
        beat: seconds between two looks.
        patience: seconds after which a silent rank is gone.
    """

    def __init__(
        self,
        store: Any,
        number: int,
        count: int,
        beat: float = BEAT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ):
        self.number, self.count, self.beat, self.patience = number, count, beat, patience
        self._store, self._lock = store, threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank watch")

    def __enter__(self) -> "RankWatch":
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._ended.set()
        if self._store is not None and kind is None:
            with contextlib.suppress(RuntimeError), self._lock:
                self._store.set(f"done/{self.number}", "1")

    def one_has_failed(self) -> bool:
        """Return whether a rank has told all that it has failed."""
        with self._lock:
            return self._store is not None and self._store.check([_FAILED])

    def report(self) -> bool:
        """Tell all ranks that this one has failed; return whether it is the first that does."""
        if self._store is None:
            return True
        try:
            with self._lock:
                return _is_first(self._store, self.number)
        except RuntimeError:  # the store is gone, with whom it could tell
            return True

    def _watch(self) -> None:
        """Beat, and look, until the context ends or another rank fails."""
        following = (self.number + 1) % self.count
        heard, silent, looked = -1, 0.0, time.monotonic()
        while not self._ended.wait(self.beat):
            try:
                with self._lock:
                    self._store.add(f"beat/{self.number}", 1)
                    found = self._store.add(f"beat/{following}", 0)
                    failed = self._store.check([_FAILED])
                    done = self._store.check([f"done/{following}"])
            except RuntimeError:
                # torchrun may have been asked to end, and have passed that on: it is said why.
                if not self._ended.wait(_SECONDS_TO_END):
                    self._end("expected torchrun's store, which is gone")
                return
            if failed:
                # The rank that failed says why; its peers would otherwise wait for it.
                self._end(None)
                return
            # A machine's processes may all have been stopped and gone on, which is no silence.
            passed, looked = min(time.monotonic() - looked, 2 * self.beat), time.monotonic()
            silent = 0.0 if found != heard or done else silent + passed
            heard = found
            if silent > self.patience:
                lost = f"expected to hear of rank {following} within {self.patience:g} seconds"
                self._end(f"{lost}, and it is gone" if self.report() else None)
                return

    def _end(self, reason: str | None) -> None:
        """End the process at once, as its main thread may wait for one that is gone.

        What it has written is whole: files get their names only when they are.
        """
        if self._ended.is_set():
            return
        if reason is not None and not last_words.begin():
            time.sleep(_SECONDS_TO_SPEAK)
        elif reason is not None:
            with contextlib.suppress(OSError, ValueError):
                stream = sys.__stderr__
                if stream is not None:
                    rank = f"rank {self.number} of {self.count}"
                    print(f"adatape-kernels: {rank}: {reason}", file=stream, flush=True)
        os._exit(EXIT_BY_ANOTHER)
