"""Modules whose arguments and results hold tensors, and torch's full backward hooks on them."""

import copy
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import BackwardHook, RemovableHandle

_HOOKS, _PRE_HOOKS = "_hooks_of_batches", "_pre_hooks_of_batches"
"""The attributes of a module that hold its hooks by the number that torch gives each of them."""


class ElasticModule(nn.Module):
    """A module whose full backward hooks see the tensors inside of what it takes and returns.

    Torch's own hooks see tensors only that are arguments or a tuple of results themselves, and are
    never called for a module that returns an `ElasticBatch`. Here `grad_input` has one entry for
    each tensor of floating point in the positional arguments, and `grad_output` for each one in the
    result: batches, named tuples, dataclasses, tuples, lists and dictionaries are looked into, in
    the order of their fields, and a batch counts as its `data`. So it is the gradient of data alone
    for an encoder layer; of data, weights and ponder losses for the result of a `TapeReader`; and
    of logits, ponder losses and then weights and ponder losses of each read for that of a model.

    All else is as in torch, replacing a gradient by returning another one included. All layers and
    models of this package are such modules; a module of your own extends this class in the place
    of `nn.Module`. Hooks that are set on all modules of a process at once are torch's own.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16)
        >>> def hook(module, grad_input, grad_output):
        ...     print(len(grad_input), grad_output[0].shape)
        >>> handle = layer.register_full_backward_hook(hook)
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8, requires_grad=True))
        >>> layer(x).data.sum().backward()
        1 torch.Size([6, 8])
    """

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call a hook whenever gradients of the inputs are computed, as torch does.

        Args:
            hook: takes the module, grad_input and grad_output, and may return other gradients of
                the inputs.
            prepend: whether it runs before those that are registered already.

        Returns:
            A handle, whose `remove` ends this.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layer = ak.layers.DualFFN(dim=8, ffn_dim=16)
            >>> handle = layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)
            >>> handle.remove()
        """
        return self._registered(_HOOKS, hook, prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call a hook before gradients of the module are computed, as torch does.

        Args:
            hook: takes the module and grad_output, and may return other gradients of the outputs.
            prepend: whether it runs before those that are registered already.

        Returns:
            A handle, whose `remove` ends this.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layer = ak.layers.DualFFN(dim=8, ffn_dim=16)
            >>> handle = layer.register_full_backward_pre_hook(lambda module, grad_out: None)
            >>> handle.remove()
        """
        return self._registered(_PRE_HOOKS, hook, prepend)

    def register_backward_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Refuse torch's deprecated hooks, which look for the gradient of a bare tensor.

        Raises:
            RuntimeError: always.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.DualFFN(dim=8, ffn_dim=16).register_backward_hook(print)
            Traceback (most recent call last):
            RuntimeError: hook: expected register_full_backward_hook, got register_backward_hook
        """
        raise RuntimeError("hook: expected register_full_backward_hook, got register_backward_hook")

    def _registered(self, name: str, hook: Callable[..., Any], prepend: bool) -> RemovableHandle:
        if _HOOKS not in self.__dict__:
            self.__dict__[_HOOKS], self.__dict__[_PRE_HOOKS] = OrderedDict(), OrderedDict()
            self.register_forward_pre_hook(_begin)
            self.register_forward_hook(_end, always_call=True)
        hooks: OrderedDict[int, Callable[..., Any]] = self.__dict__[name]
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle


class _Calls(threading.local):
    """The calls of modules with hooks that have begun on a thread, the innermost last."""

    def __init__(self) -> None:
        self.begun: list[tuple[nn.Module, BackwardHook]] = []


_CALLS = _Calls()


def _begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a module's forward: link the tensors in its arguments to its hooks."""
    hooks, pre_hooks = module.__dict__[_HOOKS], module.__dict__[_PRE_HOOKS]
    if not hooks and not pre_hooks:
        return None
    link: Any = BackwardHook(module, [*hooks.values()], [*pre_hooks.values()])
    linked = link.setup_input_hook(tuple(_tensors(args)))
    _CALLS.begun.append((module, link))
    return tuple(_with_tensors(args, iter(linked)))


def _end(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """After a module's forward, or its failure: link the tensors in its result to its hooks."""
    if not _CALLS.begun or _CALLS.begun[-1][0] is not module:
        return None
    _, link = _CALLS.begun.pop()
    linked: Any = link.setup_output_hook(tuple(_tensors(result)))
    return _with_tensors(result, iter(linked))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating point in a value, in the order of its fields."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    else:
        for part in _parts(value):
            yield from _tensors(part)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a value with others in the places of those that `_tensors` yields."""
    if isinstance(value, Tensor):
        return next(tensors) if value.is_floating_point() else value
    parts = [_with_tensors(part, tensors) for part in _parts(value)]
    if all(new is old for new, old in zip(parts, _parts(value), strict=True)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update(zip(value, parts, strict=True))
        return changed
    if isinstance(value, list):
        return parts
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _parts(value: Any) -> list[Any]:
    """Return what a container holds; nothing for all else."""
    if isinstance(value, tuple | list):
        return [*value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [*value.values()] if isinstance(value, dict) else []
