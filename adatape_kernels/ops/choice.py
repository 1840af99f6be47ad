"""A choice among kernels, which a context manager makes, and which no graph can hold.

The choice counts when an op runs. Where `torch.compile` or an exporter traces a program, entering
such a context would change nothing in the graph, so that the graph ends there or tracing fails.
"""

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

_T = TypeVar("_T")


class Choice(Generic[_T]):
    """What was chosen last, and not yet left, on this thread or in this task of an event loop."""

    def __init__(self, value: _T):
        self._value: ContextVar[_T] = ContextVar("chosen", default=value)
        self._outer: ContextVar[tuple[_T, ...]] = ContextVar("chosen_outside", default=())

    @property
    def value(self) -> _T:
        """The present choice."""
        return self._value.get()

    def enter(self, value: _T) -> None:
        """Choose, until `leave` returns to the choice before."""
        self._outer.set((*self._outer.get(), self._value.get()))
        self._value.set(value)

    def leave(self) -> None:
        """Return to the choice before the last `enter`."""
        *outer, value = self._outer.get()
        self._outer.set(tuple(outer))
        self._value.set(value)

    @contextlib.contextmanager
    def only(self, value: _T) -> Iterator[None]:
        """Choose for the time of a `with` in the package itself, which may be traced."""
        self.enter(value)
        try:
            yield
        finally:
            self.leave()


class Chosen(contextlib.ContextDecorator, Generic[_T]):
    """A context, or a decorator, in which the choice is `value`.

    Args:
        choice: the choice.
        value: what it is inside the context.
        name: the public function that made this context, for a message.
    """

    def __init__(self, choice: Choice[_T], value: _T, name: str):
        self.choice = choice
        self.value = value
        self.name = name

    def __enter__(self) -> None:
        _leave_graph(self.name)
        self.choice.enter(self.value)

    def __exit__(self, *exception: Any) -> None:
        self.choice.leave()


def _leave_graph(name: str) -> None:
    """End the graph that `torch.compile` is tracing; refuse to be traced by anything else."""
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo import graph_break

        graph_break(msg=f"{name} chooses when an op runs, not when it is traced")
    elif recorded() or torch.jit.is_tracing():
        raise RuntimeError(
            f"{name}: expected a call that runs, got one that is traced, and a traced program does "
            "not hold the choice; enter the context around its calls"
        )


def recorded() -> bool:
    """Return whether a graph is being made by running its program, as make_fx and export do."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    by_proxies = proxies is not None and proxies.get_proxy_mode() is not None
    return by_proxies or torch.compiler.is_exporting()
