"""How ops come to stand under `torch.ops`, also when the package is imported again in one process.

A notebook or a test runner may drop the package from `sys.modules` and import it anew. Torch keeps
what the first import registered, so it is kept where torch keeps it, on the namespace
`torch.ops.adatape`: the definitions stay for ever, since op objects that others hold point to them;
kernels, fakes and derivatives of the earlier import give way to those of the later one; and the
choices of `use_backend` are shared, so that either import's `use_backend` governs every call.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from adatape_kernels.ops import fast_autograd

_T = TypeVar("_T")


class Namespace:
    """The libraries by which this import defines and serves the ops of `torch.ops.<name>`.

    Args:
        name: the namespace.
    """

    def __init__(self, name: str):
        self.name = name
        self._definitions = kept(f"{name}.definitions", lambda: _library(name, "FRAGMENT"))

    def kernels_of(self, op: str, kind: str = "kernels") -> Any:
        """Return a new library for the kernels, fakes and derivatives of an op.

        What an earlier import registered for this op is taken back. The other ops keep theirs, so
        that an import that fails, or that of a single module, leaves them as they are.

        Args:
            op: the op's name, without the namespace.
            kind: what is registered with it, where an op has several libraries.
        """
        name = f"{self.name}.{op}.{kind}"
        earlier = _kept.pop(name, None)
        if earlier is not None:
            fast_autograd.take_back(earlier)
        return kept(name, lambda: _library(self.name, "IMPL"))

    def define(self, schema: str, tags: Sequence[torch.Tag] = ()) -> Any:
        """Define an op, unless an earlier import has, and return its overload.

        Raises:
            RuntimeError: an earlier import defined it by another schema.
        """
        name = schema[: schema.index("(")]
        schemas: dict[str, str] = kept(f"{self.name}.schemas", dict)
        if schemas.setdefault(name, schema) != schema:
            raise RuntimeError(
                f"{name}: expected one schema in a process, got another version of the package, "
                "which takes a new process"
            )
        ops = getattr(torch.ops, self.name)
        if not hasattr(ops, name):
            self._definitions.define(schema, tags=tags)
        return self.overload_of(name)

    def overload_of(self, op: str) -> Any:
        """Return the overload of an op that was defined, given its name without the namespace."""
        return getattr(getattr(torch.ops, self.name), op).default


_kept: dict[str, Any] = vars(torch.ops.adatape).setdefault("kept_by_adatape_kernels", {})


def kept(name: str, make: Callable[[], _T]) -> _T:
    """Return what an earlier import of the package kept under a name, or make and keep it."""
    if name not in _kept:
        _kept[name] = make()
    return _kept[name]


def _library(namespace: str, kind: str) -> Any:
    return torch.library.Library(namespace, kind)


def flop_formula(op: Any, *, get_raw: bool = False) -> Callable[..., Any]:
    """Register what counts the FLOPs of an op, as torch's `register_flop_formula` does.

    The formula takes the place of one that an earlier import of the package registered. It counts
    for the op that carries a choice as well, which has one more argument, by its name.
    """
    name = op.__name__
    ops = [getattr(torch.ops, n) for n in ("adatape", "adatape_carrying")]
    targets = [getattr(namespace, name) for namespace in ops if hasattr(namespace, name)]
    for target in targets:
        flop_registry.pop(target, None)
    return register_flop_formula(targets, get_raw=get_raw)
