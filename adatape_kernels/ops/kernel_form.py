"""Kernels of the CPU that take an op's arguments in another form than the op itself does."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from adatape_kernels.ops.compiled_part import cpp_kernel
from adatape_kernels.ops.direct_call import AtOnce, direct_call
from adatape_kernels.ops.op import Operation, note_ran
from adatape_kernels.ops.registration import Namespace

_cpu = Namespace("adatape_cpu")


def at_once_in_form(operation: Operation, schema: str, int32: Sequence[str] = ()) -> AtOnce:
    """Return what makes calls of an op at once, by a kernel of csrc/cpu that is no op's own.

    Autograd sees the op's derivative, which gets the arguments as they were given here, and whoever
    observes calls has to see the op, for which there is nothing here: the results are None.

    Args:
        operation: the op, which has as many arguments and the same results.
        schema: of the kernel, under a name of its own.
        int32: as in `direct_call`.
    """
    given = cpp_kernel()
    if given.absent is not None:
        return lambda *args: None
    name = schema[: schema.index("(")]
    kernel = given.bind(name, schema, _cpu).kernel

    def kernel_for(args: Sequence[Any]) -> Callable[..., Any] | None:
        return None if operation.kernel_for(args) is None else kernel

    ran = functools.partial(note_ran, operation.name, "cpp")
    overload = _cpu.overload_of(name)
    return direct_call(overload, operation.directly, kernel_for, ran, int32)
