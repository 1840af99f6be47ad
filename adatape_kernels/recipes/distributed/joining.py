"""How a process joins the others that torchrun has started, and how all of them end."""

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.distributed.one_voice import Nowhere
from adatape_kernels.recipes.distributed.rank_watch import (
    EXIT_BY_ANOTHER,
    WATCH,
    RankWatch,
    place_of_store,
    store_of_torchrun,
)
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.interruptions import EXIT_INTERRUPTED, interruptible
from adatape_kernels.recipes.terminal import say

SECONDS_BEFORE_A_NOTE = 20.0
"""How long a rank waits for the others to begin before it says so."""
_LONGEST_WAIT = timedelta(minutes=30)
# Seconds between two looks whether all ranks are there, at first and at most.
_FIRST_LOOK, _LAST_LOOK = 0.01, 0.5
# Of torch's DistributedDataParallel: a name that newer versions have for an option that older ones
# know by this one alone, and the layout of small gradients. Of its FSDP2: what a model returns must
# not be changed in place, as it is not here.
_NO_FAULTS = (
    "`broadcast_buffers` is deprecated",
    "Grad strides do not match",
    "FSDP2-wrapped module",
)

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
    watch = RankWatch(store_of_torchrun(WATCH, ranks.restarts), ranks.number, ranks.count)
    try:
        store = store_of_torchrun("group", ranks.restarts) if ours else None
        if store is not None:
            with _said_when_it_takes_long(ranks):
                _wait_for_all(store, ranks, watch)
        with watch:
            if ours:
                with _said_when_it_takes_long(ranks):
                    dist.init_process_group(
                        "nccl" if device.type == "cuda" else "gloo",
                        store=store,
                        rank=ranks.number,
                        world_size=ranks.count,
                        timeout=_LONGEST_WAIT,
                    )
            quiet = _quiet(not ranks.leads)
            with quiet, interruptible(for_good=True), warnings.catch_warnings():
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


def _wait_for_all(store: Any, ranks: Ranks, watch: RankWatch) -> None:
    """Wait until all ranks have come so far.

    torch's own wait hears of no signal and of no rank that has failed before it came here.

    Args:
        store: what all ranks read and write.
        ranks: the processes.
        watch: what knows whether one has failed; it does not run yet.

    Raises:
        RuntimeError: not all have come within half an hour.
        SystemExit: one has failed, and has said why.
    """
    came = store.add("came", 1)
    until, pause = time.monotonic() + _LONGEST_WAIT.total_seconds(), _FIRST_LOOK
    while True:
        if watch.one_has_failed():
            raise SystemExit(EXIT_BY_ANOTHER)
        if came >= ranks.count:
            return
        if time.monotonic() > until:
            raise RuntimeError(
                f"rank {ranks.number} of {ranks.count}: expected all ranks to begin within "
                f"{_LONGEST_WAIT}, got {came} of them"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LAST_LOOK)
        came = store.add("came", 0)


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


def _stop(ranks: Ranks, watch: RankWatch, error: BaseException) -> NoReturn:
    """Raise the error of the first rank that fails, and end the others without a word."""
    # torchrun, which has seen a rank go, may ask this one to end while that is on its way up here.
    if isinstance(error, KeyboardInterrupt) and not error.args:
        earlier = error.__context__
        if earlier is not None and _is_of_communication(earlier):
            error = earlier
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_BY_ANOTHER
    atexit.register(_leave, code)
    if not watch.report():
        raise SystemExit(code) from None
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
    with contextlib.redirect_stdout(Nowhere()), contextlib.redirect_stderr(Nowhere()):
        yield
