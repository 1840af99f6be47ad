"""Lets `report` listen to loops of halting steps on its thread, wherever they run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adatape_kernels.halting.state import HaltingState


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.called: list[Callable[[HaltingState], None]] = []


_listeners = _Listeners()


def tell(state: HaltingState) -> None:
    """Say that a loop has begun, or taken a step."""
    for called in _listeners.called:
        called(state)


@contextmanager
def listening(called: Callable[[HaltingState], None]) -> Iterator[None]:
    """Call a function with the state after each beginning and each step on this thread."""
    _listeners.called.append(called)
    try:
        yield
    finally:
        _listeners.called.remove(called)
