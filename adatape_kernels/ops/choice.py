"""A thread's choice among kernels, which a context manager makes, and which no graph can hold.

The choice counts when an op runs. Where `torch.compile` or an exporter traces a program, entering
such a context would change nothing in the graph, so that the graph ends there or tracing fails.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

_T = TypeVar("_T")


class Choice(threading.local, Generic[_T]):
    """What this thread chose last and has not yet left."""

    def __init__(self, value: _T):
        self.value = value
        self.outer: list[_T] = []
        """The values to go back to, the last one first to return to."""

    @contextlib.contextmanager
    def only(self, value: _T) -> Iterator[None]:
        """Choose for the time of a `with` in the package itself, which may be traced."""
        previous, self.value = self.value, value
        try:
            yield
        finally:
            self.value = previous


class Chosen(contextlib.ContextDecorator, Generic[_T]):
    """A context, or a decorator, in which a thread's choice is `value`.

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
        self.choice.outer.append(self.choice.value)
        self.choice.value = self.value

    def __exit__(self, *exception: Any) -> None:
        self.choice.value = self.choice.outer.pop()


def _leave_graph(name: str) -> None:
    """End the graph that `torch.compile` is tracing; refuse to be traced by anything else."""
    if torch.compiler.is_dynamo_compiling():
        from torch._dynamo import graph_break

        graph_break(msg=f"{name} chooses when an op runs, not when it is traced")
    elif _traced():
        raise RuntimeError(
            f"{name}: expected a call that runs, got one that is traced, and a traced program does "
            "not hold the choice; enter the context around its calls"
        )


def _traced() -> bool:
    """Return whether a program is being recorded by running it: export, make_fx, jit.trace."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    recorded = proxies is not None and proxies.get_proxy_mode() is not None
    return recorded or torch.compiler.is_exporting() or torch.jit.is_tracing()
