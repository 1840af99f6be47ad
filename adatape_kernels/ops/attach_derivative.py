"""How an op gets its derivative: by private names of torch where they are here, else publicly."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from adatape_kernels.ops import fast_autograd


def attach(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    *,
    plain_torch: fast_autograd.PlainTorch | None = None,
    composed: bool = False,
    instead: Callable[[], Callable[..., Any] | None] | None = None,
    in_place: bool = False,
    public: bool | None = None,
) -> fast_autograd.Directly | None:
    """Attach the derivative of an op, in the fast way if this torch has what it takes.

    Args:
        library: that of the op.
        name: the op's, without the namespace.
        run: the op's function below autograd.
        backward: takes the context and a gradient for each result, None where there is none, and
            returns a gradient for each argument.
        setup_context: takes the context, the arguments and the results.
        plain_torch: the op by torch's own ops, of which forward mode takes the tangents; None for
            an op that has no forward mode.
        composed: whether `run` calls differentiable ops only, so that forward mode and torch.func
            look through it.
        instead: returns the op, or None, that takes this one's place in a graph being traced; the
            public way does without.
        in_place: whether the op writes into its first argument, which has no derivative, so that
            what asks for one is refused; the public way leaves that to the op's public function.
        public: True for `torch.library.register_autograd`; None decides by the names that are here.

    Returns:
        What calls a kernel in the place of the op, where nothing observes it; None for the public
        way, and for an op in place.
    """
    if bool(fast_autograd.missing_names()) if public is None else public:
        if not in_place:
            _attach_publicly(library, name, backward, setup_context)
        return None
    if in_place:
        fast_autograd.attach_in_place(library, name, run, instead)
        return None
    return fast_autograd.attach_fast(
        library, name, run, backward, setup_context, plain_torch, composed, instead
    )


def _attach_publicly(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    def without_tangents(ctx: Any, inputs: tuple, output: Any) -> None:
        refuse_tangents(name)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(
        f"{library.ns}::{name}", backward, setup_context=without_tangents, lib=library
    )


def refuse_tangents(name: str) -> None:
    """Raise NotImplementedError in forward mode. It is slow, and meant for the public way."""
    nothing = torch.zeros(())
    try:
        forward_ad.make_dual(nothing, nothing)
    except RuntimeError:  # torch has no public way to ask whether a level was entered
        return
    raise NotImplementedError(f"{name}: expected no forward-mode differentiation, got a dual level")
