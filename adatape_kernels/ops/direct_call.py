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


AtOnce = Callable[..., Any]
"""Returns an op's results, or None where the call has to go through the op."""


def direct_call(
    overload: Any,
    directly: Directly | None,
    kernel_for: Callable[[tuple[Any, ...]], Callable[..., Any] | None],
    ran: Callable[[], None],
    int32: Sequence[str] = (),
) -> AtOnce:
    """Return what makes those calls of an op that its kernel alone can serve.

    Args:
        overload: an op with the arguments that are given.
        directly: as `attach_derivative.attach` returns it.
        kernel_for: takes the arguments and returns the kernel that serves the call, which checks
            them itself and may raise whatever error it likes; None where there is none, as for
            every call whose first argument lies elsewhere than on a CPU.
        ran: is called after a call, to note which backend served it.
        int32: the names of those tensors that have to be int32, and which the op's public function
            takes as int64 as well.
    """
    arguments = overload._schema.arguments
    plain = tuple(_plain_types(str(each.type)) for each in arguments)
    int32_places = tuple(i for i, each in enumerate(arguments) if each.name in int32)
    # There are few plain types, so that this does not grow without end.
    known: set[tuple[type, ...]] = set()

    def are_plain(types: tuple[type, ...]) -> bool:
        if len(types) != len(plain):
            return False
        if not all(given in expected for given, expected in zip(types, plain, strict=True)):
            return False
        known.add(types)
        return True

    # A function of local names: to look up attributes of an object takes time as well.
    def at_once(*args: Any) -> Any:
        if directly is None or torch.compiler.is_compiling() or not unobserved():
            return None
        types = tuple(map(type, args))
        if types not in known and not are_plain(types):
            return None
        kernel = kernel_for(args)
        if kernel is None:
            return None
        for place in int32_places:
            if args[place].dtype is not torch.int32:
                return None
        results = directly(kernel, args)
        if results is not None:
            ran()
        return results

    return at_once


def _plain_types(kind: str) -> tuple[type, ...]:
    inner = kind.removeprefix("Optional[").removesuffix("]")
    types = _TYPES[inner]
    return types if inner == kind else (*types, type(None))
