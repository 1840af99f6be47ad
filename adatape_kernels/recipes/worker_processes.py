"""Tasks in processes of their own, of which each computes with one thread.

Models as small as those of the recipes gain little from a second thread, and so a task comes out
the same however many run beside it.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from adatape_kernels.ops.op import use_backend

MOST_JOBS = 1024

Tell = Callable[[Any], None]
"""What a task calls to tell the process that started it how far it is."""
Work = Callable[[Any, Tell], Any]
"""What a process does with a task: a function of a module, which is given the task."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    tasks: Sequence[tuple[str, Any]], work: Work, jobs: int, backends: Sequence[str] = ()
) -> Iterator[Any]:
    """Work on tasks in several processes, each of which takes the next task when it has done one.

    Args:
        tasks: a name for errors, and what `work` is called with, which pickle takes.
        work: what is done with each.
        jobs: the most processes at a time.
        backends: the backend that serves the ops, and those that serve what it does not.

    Yields:
        What tasks tell and what they return, as it comes.

    Raises:
        RuntimeError: a task failed, or its process was ended; the error begins with the name.
    """
    left = list(tasks)
    workers: dict[Connection, tuple[BaseProcess, str]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        for _ in range(min(jobs, len(left))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_serve, args=(theirs, work, tuple(backends)), daemon=True
            )
            process.start()
            theirs.close()
            workers[ours] = process, left[0][0]
            _give(ours, left.pop(0))
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker, name = workers[connection]
                try:
                    kind, message = connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.join()
                    raise RuntimeError(
                        f"{name}: expected to end, got its process ended with exit code "
                        f"{worker.exitcode}"
                    ) from None
                if kind == "failed":
                    raise RuntimeError(message)
                yield message
                if kind == "returned" and left:
                    workers[connection] = worker, left[0][0]
                    _give(connection, left.pop(0))
                elif kind == "returned":
                    del workers[connection]
                    _give(connection, None)
                    worker.join()
    finally:
        for worker, _ in workers.values():
            worker.kill()
            worker.join()


def _give(connection: Connection, task: tuple[str, Any] | None) -> None:
    # A process that was ended shows when its answer is waited for.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(task)


def _serve(connection: Connection, work: Work, backends: Sequence[str]) -> None:
    """Work on what comes, in this process, until None comes."""
    # An interrupt is for the process that started this one, which then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    first, *fallback = backends or (None,)
    # Without the process that started it this one has nothing to do any more.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
        while (task := connection.recv()) is not None:
            name, given = task
            try:
                with use_backend(first, fallback):
                    result = work(given, lambda message: connection.send(("told", message)))
                connection.send(("returned", result))
            except (ValueError, RuntimeError, MemoryError, OSError) as error:
                if isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise
                connection.send(("failed", f"{name}: {error or type(error).__name__}"))
                return
