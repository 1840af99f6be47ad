"""Which backend serves which calls, as the implementations themselves state it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from adatape_kernels.ops.device_facts import facts_for
from adatape_kernels.ops.implementation import FLOAT_DTYPES, short
from adatape_kernels.ops.op import BACKENDS, operation, registered_ops

DEVICES = ("cpu", "cuda")


class Support(NamedTuple):
    """What one backend states of one typical call of an op."""

    op: str
    call: str
    """What is typical of the call, in words."""
    device: str
    dtype: str
    backend: str
    reason: str | None
    """Why the backend does not serve the call; None where it does."""
    default: bool
    """Whether the call goes to it where `use_backend` names none."""
    absent: str | None
    """Why this installation lacks the kernel; None where it is here.

    On a device that is not here `reason` passes over it, and says what a machine with such a device
    and an installation made for it would be offered.
    """


def is_here(device_type: str) -> bool:
    """Return whether this machine has such a device."""
    return device_type == "cpu" or torch.cuda.is_available()


def supported(device_type: str) -> Iterator[Support]:
    """Ask every implementation about every typical call of its op on a device, here or not.

    Example:
        >>> from adatape_kernels.ops.support import supported
        >>> {e.backend for e in supported("cpu") if e.dtype == "float64" and e.default}
        {'eager'}
    """
    facts, elsewhere = facts_for(device_type), not is_here(device_type)
    for name in registered_ops():
        op = operation(name)
        for call, make in op.typical.items():
            for dtype in FLOAT_DTYPES:
                args = make(dtype)
                default = op.serving(args, device_type, facts, installed=elsewhere)
                for backend in BACKENDS:
                    given = op.implementations.get(backend)
                    yield Support(
                        op=name,
                        call=call,
                        device=device_type,
                        dtype=short(dtype),
                        backend=backend,
                        reason=op.refusal(backend, args, device_type, facts, installed=elsewhere),
                        default=backend == default,
                        absent=None if given is None else given.absent,
                    )
