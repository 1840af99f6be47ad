"""Every private name of torch that this package uses, each with the public way beside it.

`torch.library.register_autograd` attaches a derivative through the dispatcher, which then sees a
call twice. With four private names a call on plain tensors ends at once in what serves it, which
`adatape-kernels bench dispatch` measures against the public way. Where torch lacks one of these
names, the public way serves and nothing else changes.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

PRIVATE_NAMES = (
    "DispatchKeySet",
    "_after_autograd_keyset",
    "_AutoDispatchBelowAutograd",
    "_any_requires_grad",
)
"""Members of torch._C that the fast path needs."""


def missing_names() -> tuple[str, ...]:
    """Return the private names that this torch does not have."""
    return tuple(name for name in PRIVATE_NAMES if not hasattr(torch._C, name))


def attach(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    *,
    public: bool | None = None,
) -> None:
    """Attach the derivative of an op, in the fast way if this torch has what it takes.

    Args:
        library: that of the op.
        name: the op's, without the namespace.
        run: the op's function below autograd.
        backward: takes the context and a gradient for each result, None where there is none, and
            returns a gradient for each argument.
        setup_context: takes the context, the arguments and the results.
        public: True for `torch.library.register_autograd`; None decides by the names that are here.
    """
    if bool(missing_names()) if public is None else public:
        _attach_publicly(library, name, backward, setup_context)
    else:
        _attach_fast(library, name, run, backward, setup_context)


def _attach_publicly(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    torch.library.register_autograd(
        f"{library.ns}::{name}", backward, setup_context=setup_context, lib=library
    )


def _attach_fast(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    op = getattr(getattr(torch.ops, library.ns), name).default
    below, after_autograd = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    any_requires_grad, plain = torch._C._any_requires_grad, _plain_keys()

    def below_autograd(keys: Any, args: tuple) -> Any:
        keys = keys & after_autograd
        if keys.raw_repr() in plain:
            return run(*args)
        with below():
            return op.redispatch(keys, *args)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        with below():
            output = below_autograd(keys, args)
        setup_context(ctx, args, output)
        return output

    def derivative(ctx: Any, *grads: Any) -> Any:
        return None, *backward(ctx, *grads)  # None is the gradient of `keys`

    functions = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    differentiable: Any = type(f"adatape_{name}", (torch.autograd.Function,), functions)

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return differentiable.apply(keys, *args)
        return below_autograd(keys, args)

    library.impl(name, autograd, "Autograd", with_keyset=True)


@functools.cache
def _plain_keys() -> frozenset[Any]:
    """Return the keys of calls in which nothing but one device's kernel is left to dispatch to.

    No mode wants to see such a call, and there is no subclass and no transform.
    """
    plain = set()
    for device in ("CPU", "CUDA"):
        with contextlib.suppress(AttributeError):
            key = getattr(torch._C.DispatchKey, device)
            plain.add(torch._C.DispatchKeySet(key).raw_repr())
    return frozenset(plain)
