"""Second and higher derivatives: what differentiates an op's backward op once more.

A kernel computes a gradient, and nobody has written a kernel for the gradient's derivative. It is
taken of the same gradient as autograd finds it through the reference: x̄ = ∂⟨ȳ, f(x)⟩ / ∂x for the
op's reference f. What the forward op kept for the backward op, such as the log-sum-exp of a row,
depends on x too, and is computed anew rather than taken for a constant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops.op import Operation

Gradients = Callable[..., Sequence[Tensor]]
"""Takes the arguments of a backward op and returns its results as functions of those."""


def twice_differentiable(
    backward_op: Operation, gradients: Gradients, closed_form: Gradients | None = None
) -> None:
    """Let autograd differentiate a backward op, as often as one likes.

    Args:
        backward_op: the op.
        gradients: its results by torch's own ops. Every floating-point tensor among its arguments
            requires a gradient, so that `gradient_of` applies to each.
        closed_form: its results as formulas, of which forward mode takes tangents; None for the
            op's eager implementation. Since autograd may differentiate a tangent once more, what
            the forward op kept is computed anew here as well.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.others = [None if isinstance(given, Tensor) else given for given in inputs]
        ctx.places = [i for i, given in enumerate(inputs) if isinstance(given, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        args, higher = list(ctx.others), torch.is_grad_enabled()
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[place] = tensor
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[-len(args) :]) if needed]
        with torch.enable_grad():
            args = _requiring_gradients(args, args[wanted[0]])
            results = gradients(*args)
            found = _derivatives(results, [args[i] for i in wanted], grads, higher)
        by_argument = dict(zip(wanted, found, strict=True))
        return tuple(by_argument.get(i) for i in range(len(args)))

    def plain_torch(inputs: tuple, output: tuple) -> Sequence[Tensor]:
        return (closed_form or backward_op.implementations["eager"].function)(*inputs)

    backward_op.differentiable(backward, setup_context, plain_torch)


with torch.inference_mode(False):
    _leaf = torch.zeros((), device="cpu", requires_grad=True)


def _requiring_gradients(args: list[Any], some: Tensor) -> list[Any]:
    """Return arguments of the same values, each floating-point tensor of which requires a gradient.

    Inside torch.func nobody may ask that of a tensor. One without gets it from a sum: with a part
    of `some` that is never taken, as `some` requires a gradient of the transform at work; or, where
    that transform has ended, with a leaf that no transform knows.
    """
    never = torch.zeros((), dtype=torch.bool, device=some.device)
    nothing = some.sum().where(never, 0)
    if not nothing.requires_grad:
        nothing = _leaf.to(some.device)

    def requiring(given: Any) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        alias = given.view_as(given)
        return alias if alias.requires_grad else alias + nothing.to(given.dtype)

    return [requiring(given) for given in args]


def gradient_of(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Return ∂⟨grads, function(inputs)⟩ / ∂inputs, differentiable.

    Args:
        function: takes the inputs, and returns results by torch's own ops.
        inputs: tensors that require gradients.
        grads: one for each result, or None.
    """
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    if not any(x.requires_grad for x in inputs):
        # Forward mode around them has no place where its tensors could require a gradient.
        raise NotImplementedError(
            "torch.func: expected forward mode inside of reverse mode for a third derivative, got "
            "forward mode outside of two reverse passes"
        )
    found = _derivatives(results, inputs, grads, create_graph=True)
    return tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)
    )


def _derivatives(
    results: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """Return what `torch.autograd.grad` does, and None for all where no result has a derivative.

    A result that nothing was added to, as of a buffer without rows, has none.
    """
    pairs = [
        (y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, given, create_graph=create_graph, allow_unused=True)
