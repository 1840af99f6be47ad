"""Calls that go past the op, straight to its kernel for the CPU, where nobody would notice.

Beside its kernel a call costs some microseconds: those of the checks of its arguments, and of two
trips through torch's dispatcher, to the op with our choice of a backend and to the kernel. Of a
call on a few rows that is most of the time. But the kernels of csrc/cpu check everything
themselves. So a call of the plainest kind makes the second trip only, with autograd around it if a
gradient is asked for; and where the kernel raises an error, the call is made once more, as any
other, so that the error is the same.

What torch has no way to ask for is not noticed: an execution trace, or a profiler that another
thread has started for all threads, shows the kernel, `adatape_cpu::...`, without the op around it.
Nor is it noticed that somebody has registered an autograd kernel of his own for the op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops.fast_autograd import Directly, unobserved

_TENSORS = (Tensor, torch.nn.Parameter)
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": _TENSORS,
    "int": (int,),
    "SymInt": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
}
"""By a type of a schema, the types that a plain argument has; subclasses are not plain."""


class DirectCall:
    """What makes those calls of an op that its kernel alone can serve.

    Args:
        overload: the op.
        directly: as `attach_derivative.attach` returns it.
        kernel_for: takes the arguments and returns the kernel that serves the call, which checks
            them itself and may raise whatever error it likes; None where there is none.
        ran: is called after a call, to note which backend served it.
        int32: the names of those tensors that have to be int32, and which the op's public function
            takes as int64 as well.
    """

    def __init__(
        self,
        overload: Any,
        directly: Directly | None,
        kernel_for: Callable[[tuple[Any, ...]], Callable[..., Any] | None],
        ran: Callable[[], None],
        int32: Sequence[str] = (),
    ):
        self._directly = directly
        self._kernel_for = kernel_for
        self._ran = ran
        arguments = overload._schema.arguments
        self._plain = tuple(_plain_types(str(each.type)) for each in arguments)
        self._int32 = tuple(i for i, each in enumerate(arguments) if each.name in int32)
        self._places: dict[tuple[type, ...], tuple[int, ...]] = {}

    def at_once(self, *args: Any) -> Any:
        """Return the op's results, or None where the call has to go through the op."""
        if not unobserved() or self._directly is None:
            return None
        types = tuple(map(type, args))
        places = self._places.get(types) or self._places_of(types)
        if places is None:
            return None
        kernel = self._kernel_for(args)
        if kernel is None:
            return None
        tensors = [args[place] for place in places]
        for tensor in tensors:
            if not tensor.is_cpu:
                return None
        for place in self._int32:
            if args[place].dtype is not torch.int32:
                return None
        results = self._directly(kernel, args, tensors)
        if results is not None:
            self._ran()
        return results

    def _places_of(self, types: tuple[type, ...]) -> tuple[int, ...] | None:
        """Return where tensors stand among arguments of these types, None if one is not plain."""
        if len(types) != len(self._plain):
            return None
        if not all(given in plain for given, plain in zip(types, self._plain, strict=True)):
            return None
        # There are few plain types, so that this does not grow without end.
        places = tuple(i for i, given in enumerate(types) if given in _TENSORS)
        return self._places.setdefault(types, places)


def _plain_types(kind: str) -> tuple[type, ...]:
    inner = kind.removeprefix("Optional[").removesuffix("]")
    types = _TYPES[inner]
    return types if inner == kind else (*types, type(None))
