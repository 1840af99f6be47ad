"""Ops that consist of other ops of ours."""

from collections.abc import Callable, Sequence
from typing import Any

from adatape_kernels.ops import fast_autograd
from adatape_kernels.ops.declaration import ADATAPE, declare
from adatape_kernels.ops.derivative import Derivative
from adatape_kernels.ops.direct_call import direct_call
from adatape_kernels.ops.implementation import CompiledKernel
from adatape_kernels.ops.op import backend_choice, note_ran, operation
from adatape_kernels.ops.registration import Namespace

_cpu = Namespace("adatape_cpu")
_compositions: dict[str, "Composition"] = {}


class Composition:
    """An op `adatape::name` that calls other ops of ours, with a derivative of its own.

    Which backends serve it is said, and recorded, of the ops it calls.

    Args:
        schema: as in `Operation`.
        function: calls the other ops.
        parts: the names of these ops, in their order, if `kernel` is given. They take the same
            first argument, and state no limits in C++.
        kernel: does what they do one after another in C++, for calls that C++ serves anyway.
    """

    def __init__(
        self,
        schema: str,
        function: Callable[..., Any],
        *,
        parts: Sequence[str] = (),
        kernel: CompiledKernel | None = None,
    ):
        self.name = schema[: schema.index("(")]
        self.schema = schema
        self.function = function
        self.parts = tuple(parts)
        there = kernel is not None and kernel.absent is None
        self._kernel = kernel.bind(self.name, schema, _cpu).kernel if kernel and there else None
        self._library = ADATAPE.kernels_of(self.name)
        self.overload = declare(schema, self._library, function, function)
        _compositions[self.name] = self

    def differentiable(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
        plain_torch: fast_autograd.PlainTorch | None = None,
    ) -> None:
        """Give the op its derivative, as `Operation.differentiable` does.

        Without `plain_torch`, forward mode and torch.func see the ops that this one calls.
        """
        derivative = Derivative(self.name, self._library, backend_choice)
        derivative.set(backward, setup_context, plain_torch)
        composed = plain_torch is None
        directly = derivative.attach(self.function, composed=composed, carrying=False)
        self.at_once = direct_call(self.overload, directly, self._kernel_for, self._note_ran)

    def _kernel_for(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        for part in self.parts:
            if operation(part).kernel_for(args) is None:
                return None
        return self._kernel

    def _note_ran(self) -> None:
        for part in self.parts:
            note_ran(part, "cpp")


def compositions() -> tuple[Composition, ...]:
    """Return the ops that call other ops of ours."""
    return tuple(_compositions.values())
