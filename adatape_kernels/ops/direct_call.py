"""Calls that go to a kernel of the CPU without torch's dispatcher, where nobody would notice.

Beside its kernel a call costs some microseconds: those of the checks of its arguments, and of two
trips through the dispatcher, to our choice of a backend and to the kernel. Of a call on a few rows
that is most of the time. But the kernels of csrc/cpu check everything themselves. So a call of the
plainest kind goes to the kernel, with autograd around it if a gradient is asked for; and where the
kernel raises an error, the call is made once more, as any other, so that the error is the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops import fast_autograd

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
    """The calls of an op, or those of them that its kernel can serve without the dispatcher.

    Args:
        overload: the op.
        directly: as `fast_autograd.attach` returns it.
        int32: the names of those tensors that have to be int32, and which the op's public function
            takes as int64 as well.
    """

    def __init__(
        self, overload: Any, directly: fast_autograd.Directly | None, int32: Sequence[str] = ()
    ):
        self._directly = directly
        arguments = overload._schema.arguments
        self._plain = tuple(_plain_types(str(each.type)) for each in arguments)
        self._int32 = tuple(i for i, each in enumerate(arguments) if each.name in int32)
        self._places: dict[tuple[type, ...], tuple[int, ...]] = {}

    def tensors_of(self, args: tuple[Any, ...]) -> list[Tensor] | None:
        """Return the tensors of a call that is unobserved, plain and on a CPU; else None."""
        if not fast_autograd.unobserved() or self._directly is None:
            return None
        types = tuple(map(type, args))
        places = self._places.get(types)
        if places is None and (places := self._places_of(types)) is None:
            return None
        tensors = [args[place] for place in places]
        for tensor in tensors:
            if not tensor.is_cpu:
                return None
        for place in self._int32:
            if args[place].dtype is not torch.int32:
                return None
        return tensors

    def call(self, kernel: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        """Make a call with these tensors; return None where the dispatcher has to make it."""
        assert self._directly is not None
        try:
            return self._directly(kernel, args, tensors)
        except fast_autograd.Declined:
            return None

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
