"""Tasks in processes of their own, of which each computes with one thread.

Processes that were not started here can help, as the other ranks under torchrun do.

Models as small as those of the recipes gain little from a second thread, and so a task comes out
the same however many run beside it.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from adatape_kernels.ops.op import use_backend

MOST_JOBS = 1024

Tell = Callable[[Any], None]
"""What a task calls to tell the process that started it how far it is."""
Work = Callable[[Any, Tell], Any]
"""What a process does with a task: a function of a module, which is given the task."""


_helpers: list[Connection] = []


@contextlib.contextmanager
def helped_by(helpers: Sequence[Connection]) -> Iterator[None]:
    """Let `in_processes` give tasks to processes that `serve`, too, while the context lasts."""
    _helpers[:] = helpers
    try:
        yield
    finally:
        _helpers.clear()


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
        jobs: the most processes at a time, those that help among them.
        backends: the backend that serves the ops, and those that serve what it does not.

    Yields:
        What tasks tell and what they return, as it comes.

    Raises:
        RuntimeError: a task failed, or its process was ended; the error begins with the name.
    """
    left = [_Task(name, work, tuple(backends), given) for name, given in tasks]
    workers: dict[Connection, tuple[BaseProcess | None, str]] = {}
    context = multiprocessing.get_context("spawn")
    try:
        for _ in range(min(jobs - len(_helpers), len(left))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process, left[0].name
            _give(ours, left.pop(0))
        for helper in _helpers[: len(left)]:
            workers[helper] = None, left[0].name
            _give(helper, left.pop(0))
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                worker, name = workers[connection]
                try:
                    kind, message = connection.recv()
                except (EOFError, ConnectionResetError):
                    code = ""
                    if worker is not None:
                        worker.join()
                        code = f" with exit code {worker.exitcode}"
                    raise RuntimeError(
                        f"{name}: expected to end, got its process ended{code}"
                    ) from None
                if kind == "failed":
                    raise RuntimeError(message)
                yield message
                if kind == "returned" and left:
                    workers[connection] = worker, left[0].name
                    _give(connection, left.pop(0))
                elif kind == "returned":
                    del workers[connection]
                    if worker is not None:
                        _give(connection, None)
                        worker.join()
    finally:
        for worker, _ in workers.values():
            if worker is not None:
                worker.kill()
                worker.join()


class _Task(NamedTuple):
    """A task as it is sent to the process that works on it."""

    name: str
    work: Work
    backends: tuple[str, ...]
    given: Any


def _give(connection: Connection, task: _Task | None) -> None:
    # A process that was ended shows when its answer is waited for.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(task)


def _work(connection: Connection) -> None:
    """Do the work of a process that was started for it."""
    # An interruption is for the process that started this one, which then ends it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serve(connection)


def serve(connection: Connection) -> None:
    """Work on the tasks that `in_processes` sends, in this process, until None comes."""
    torch.set_num_threads(1)
    # Without the process that sends the tasks this one has nothing to do any more.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
        while (task := connection.recv()) is not None:
            first, *fallback = task.backends or (None,)
            try:
                with use_backend(first, fallback):
                    tell = functools.partial(_tell, connection)
                    result = task.work(task.given, tell)
                connection.send(("returned", result))
            except (ValueError, RuntimeError, MemoryError, OSError) as error:
                if isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise
                connection.send(("failed", f"{task.name}: {error or type(error).__name__}"))
                return


def _tell(connection: Connection, message: Any) -> None:
    connection.send(("told", message))
