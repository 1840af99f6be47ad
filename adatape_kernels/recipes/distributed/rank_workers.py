"""Runs that rank 0 deals out to the other ranks, as it does to worker processes of its own."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch

from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes import worker_processes
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.worker_processes import MOST_JOBS, usable_cores

_KEY_BYTES = 32


@contextlib.contextmanager
def runs_dealt_out(device: torch.device, asked: Mapping[str, Any]) -> Iterator[bool]:
    """Yield whether this process is to do a command's work, and to have its runs trained.

    Under torchrun rank 0 is, and each other rank has trained what rank 0 gave to it when its
    context begins. Without torchrun the only process is.

    Args:
        device: where this process computes.
        asked: what decides the runs, by option, which all ranks are to be asked for alike.

    Raises:
        ValueError: a rank was asked for something else; and what `joining.started` raises.
    """
    with started(device) as ranks:
        ranks.check_agreement(asked)
        if not ranks.several:
            yield True
        elif ranks.leads:
            with _connected(ranks) as helpers, worker_processes.helped_by(helpers):
                yield True
        else:
            _help(ranks)
            yield False


def runs_at_a_time(asked: int | None, device: torch.device) -> int:
    """Return how many runs are trained at a time.

    Args:
        asked: the value of --jobs; None for one a core, for one alone on a GPU, and under torchrun
            for one in each process.
        device: where is computed.

    Raises:
        ValueError: the value is out of range, or given under torchrun.
    """
    ranks = Ranks.of_environment()
    if ranks.several:
        if asked is not None:
            raise ValueError(
                "jobs: expected none under torchrun, each of whose processes trains a run, got "
                f"{asked}"
            )
        return ranks.count
    if asked is None:
        asked = usable_cores() if device.type == "cpu" else 1
    return as_integer("jobs", asked, 1, MOST_JOBS)


def device_of_each(device: torch.device) -> torch.device:
    """Return what a run's device is called where each process takes its own."""
    return torch.device(device.type) if Ranks.of_environment().several else device


@contextlib.contextmanager
def _connected(ranks: Ranks) -> Iterator[list[Connection]]:
    """Yield connections to all other ranks, which wait for tasks until the context ends."""
    key = secrets.token_bytes(_KEY_BYTES)
    host = os.environ.get("MASTER_ADDR", "localhost")
    helpers: list[Connection] = []
    with contextlib.ExitStack() as open_until_the_end:
        # What comes is unpickled only from who has the key, which ranks alone are told.
        listener = Listener((host, 0), backlog=ranks.count, authkey=key)
        with listener:
            ranks.gathered([(listener.address, key)])
            while len(helpers) < ranks.count - 1:
                with contextlib.suppress(AuthenticationError):
                    helper: Any = open_until_the_end.enter_context(listener.accept())
                    helpers.append(helper)
        yield helpers
        for helper in helpers:
            with contextlib.suppress(OSError):
                helper.send(None)


def _help(ranks: Ranks) -> None:
    """Train what rank 0 gives to this rank, until it has nothing more."""
    empty: list[tuple[Any, bytes]] = []
    ((address, key),) = ranks.gathered(empty)
    with Client(address, authkey=key) as connection:
        worker_processes.serve(connection)
