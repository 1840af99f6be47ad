"""The derivative of an op, and the backends that it runs on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops import carried_choice, fast_autograd
from adatape_kernels.ops.attach_derivative import attach
from adatape_kernels.ops.choice import Choice


class Derivative:
    """The derivative of an op, which runs on the backends that were forced around it.

    Where nothing is forced there, as on the threads that autograd has for a GPU, it runs on those
    that were forced around the forward.
    """

    def __init__(
        self, name: str, library: torch.library.Library, choice: Choice[tuple[str, ...] | None]
    ):
        self.name = name
        self.library = library
        self.choice = choice
        self.backward: Callable[..., Any] | None = None
        self.setup_context: Callable[..., None] | None = None
        self.plain_torch: fast_autograd.PlainTorch | None = None

    def set(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
        plain_torch: fast_autograd.PlainTorch | None,
    ) -> None:
        """Give the derivative what it runs; see `Operation.differentiable`."""
        self.backward, self.setup_context = backward, setup_context
        self.plain_torch = plain_torch

    def attach(
        self,
        run: Callable[..., Any],
        *,
        composed: bool = False,
        carrying: bool = True,
        in_place: bool = False,
    ) -> fast_autograd.Directly | None:
        """Register it with torch, for an op whose function below autograd is `run`.

        Args:
            run: serves a call.
            composed, in_place: as in `attach`.
            carrying: whether there is an op that runs under the choices it is given.

        Returns:
            What `attach` does.
        """
        return attach(
            self.library,
            self.name,
            run,
            self._on_its_backends,
            self._noting_backends,
            plain_torch=self._by_plain_torch,
            instead=functools.partial(carried_choice.carrying, self.name) if carrying else None,
            composed=composed,
            in_place=in_place,
        )

    def _noting_backends(self, ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.forced_backends = self.choice.value
        ctx.carried = carried_choice.present(inputs[0])
        if self.setup_context is not None:
            self.setup_context(ctx, inputs, output)

    def _on_its_backends(self, ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if self.backward is None:
            raise NotImplementedError(
                f"{self.name}: expected no backward pass, as it has no derivative, got one"
            )
        around = self.choice.value
        with self.choice.only(ctx.forced_backends if around is None else around):
            if ctx.carried is None:
                return self.backward(ctx, *grads)
            with carried_choice.handed_over(ctx.carried):
                return self.backward(ctx, *grads)

    def _by_plain_torch(self, inputs: tuple, output: Any) -> Sequence[Tensor | None]:
        if self.plain_torch is None:
            raise NotImplementedError(
                f"{self.name}: expected no dual tensors, as it has no tangents"
            )
        return self.plain_torch(inputs, output)
