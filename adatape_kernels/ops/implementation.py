"""An implementation: one backend's function for one op, and the statement of which calls it serves.

A statement is a function of the call that returns None or the reason why not, in words. What reads
them, to serve calls or to print a table, stands in op.py and support.py.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adatape_kernels.ops.device_facts import DeviceFacts, facts_of
from adatape_kernels.ops.fast_autograd import bare, refuse_ended_transforms
from adatape_kernels.ops.registration import Namespace

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)

Statement = Callable[..., str | None]
"""A function of the device's facts and the op's arguments: None, or the reason why not."""


@functools.cache
def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Implementation:
    """One backend's function for one op, with the statement of which calls it serves."""

    function: Callable[..., Any]
    """Takes the op's arguments in the order of its schema."""
    devices: tuple[str, ...] | None = None
    """Device types of the tensors that it takes; None for all."""
    dtypes: tuple[torch.dtype, ...] | Mapping[str, tuple[torch.dtype, ...]] = FLOAT_DTYPES
    """Dtypes of the op's first argument that it takes; by device type where they differ."""
    limits: Statement | None = None
    """What else it asks of a call; None where device and dtype decide."""
    absent: str | None = None
    """Why this installation lacks it; None where it is there."""
    checks_values: bool = False
    """True where it refuses bad values itself, in a pass over them that it makes anyway."""
    checks_arguments: bool = False
    """True where it refuses shapes, dtypes and devices itself that the op does not take."""
    device_limits: Callable[[DeviceFacts], str | None] | None = None
    """What it asks of the device, whatever the call; it is asked when the first call comes."""
    kernel: Callable[..., Any] | None = None
    """What does the same on a CPU, if anything does, for tensors and numbers of the plainest types;
    it checks them itself, and may raise whatever error it likes."""

    def refusal(
        self,
        args: Sequence[Any],
        device_type: str | None = None,
        facts: DeviceFacts | None = None,
        *,
        installed: bool = False,
    ) -> str | None:
        """Return why a call with these arguments cannot be served, or None when it can.

        `device_type` and `facts` stand in for the device of the first argument, and `installed`
        passes over what this installation lacks, so that what a GPU would be offered can be read
        on a machine without one.
        """
        tensor = args[0]
        device_type = device_type or tensor.device.type
        reason = self.refusal_by_type(device_type, tensor.dtype, installed=installed)
        if reason is None and self.device_limits is not None:
            reason = self.device_limits(facts or facts_of(tensor.device))
        if reason is None and self.limits is not None:
            reason = self.limits(facts or facts_of(tensor.device), *args)
        return reason

    def refusal_by_device(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why no call on a device that is here, and of this dtype, is served, or None."""
        reason = self.refusal_by_type(device.type, dtype)
        if reason is None and self.device_limits is not None:
            reason = self.device_limits(facts_of(device))
        return reason

    def refusal_by_type(
        self, device_type: str, dtype: torch.dtype, *, installed: bool = False
    ) -> str | None:
        """Return why no call on this device and of this dtype can be served, or None."""
        if self.absent is not None and not installed:
            return self.absent
        if self.devices is not None and device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}"
        dtypes = self.dtypes if isinstance(self.dtypes, tuple) else self.dtypes[device_type]
        if dtype not in dtypes:
            return f"it takes {', '.join(map(short, dtypes))}"
        return None


def implementation(**statement: Any) -> Callable[[Callable[..., Any]], Implementation]:
    """Make the decorated function an `Implementation` whose other fields are `statement`."""
    return lambda function: Implementation(function, **statement)


@dataclass(frozen=True)
class CompiledKernel:
    """An implementation in C++: the op of the same name and schema in another namespace.

    csrc registers kernels for it and declares nothing; `Operation` declares it, from its schema.
    """

    namespace: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    absent: str | None
    limits: Statement | None = None
    checks_values: bool = False
    device_limits: Callable[[DeviceFacts], str | None] | None = None
    flags: Mapping[str, Callable[[], bool]] | None = None
    """Arguments by name that only C++ takes, behind the op's own, and what gives their values."""

    def bind(
        self, name: str, schema: str, library: Namespace | torch.library.Library
    ) -> Implementation:
        """Declare the op in the namespace, and return the implementation that calls it."""
        flags = self.flags or {}
        taken = "".join(f", bool {flag}" for flag in flags)
        arguments, _, results = schema.partition(") -> ")
        library.define(f"{arguments}{taken}) -> {results}")
        call = getattr(getattr(torch.ops, self.namespace), name).default
        if isinstance(library, Namespace):
            refuse_ended_transforms(library.kernels_of(name, "refusals"), name)
        values = tuple(flags.values())

        def run(*args: Any) -> Any:
            try:
                return call(*args, *(value() for value in values)) if values else call(*args)
            except RuntimeError as error:
                # C++ has no ValueError to throw through torch, nor the op's name at hand.
                message = str(error).partition("\n")[0]
                if ": expected " in message and not message.startswith("ADATAPE_"):
                    raise ValueError(f"{name}: {message}") from None
                if ": out of memory: " in message and args[0].is_cuda:
                    raise torch.OutOfMemoryError(message) from None
                raise

        return Implementation(
            run,
            self.devices,
            self.dtypes,
            self.limits,
            self.absent,
            self.checks_values,
            checks_arguments=True,
            device_limits=self.device_limits,
            kernel=bare(call) if self.devices == ("cpu",) and not values else None,
        )
