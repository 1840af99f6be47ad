"""What kernels need to know of the device that they run on."""

import functools
from typing import NamedTuple

import torch

KIB = 1024


class DeviceFacts(NamedTuple):
    """Facts of one device."""

    name: str
    shared_memory_per_block: int
    """Bytes that one block may ask for."""
    multiprocessors: int
    capability: tuple[int, int]
    """Compute capability, major and minor."""


OLDEST_CAPABILITY = (8, 0)
"""No kernel of ours is compiled for an older GPU: it has no bfloat16 and no asynchronous copies."""

EMULATED = DeviceFacts("no GPU is here: as compute capability 9.0", 227 * KIB, 4, (9, 0))
"""What stands in for a GPU where none is: in Triton's interpreter, and in what `info` says of one.

The few multiprocessors let each program of a persistent kernel walk several tiles, as on a GPU.
"""


@functools.cache
def facts_of(device: torch.device) -> DeviceFacts:
    """Return the facts of a GPU, or of what stands in for one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return EMULATED
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        found.name,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        found.multi_processor_count,
        (found.major, found.minor),
    )


def here(device_type: str) -> torch.device:
    """Return the device of this type that torch would use now, if there is one."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)


def facts_for(device_type: str) -> DeviceFacts:
    """Return the facts of a device, or of the GPU that stands in for one that is not here."""
    return facts_of(here(device_type))


def too_old(facts: DeviceFacts) -> str | None:
    """Return why our kernels do not run on a GPU of this age, or None if they do."""
    if facts.capability >= OLDEST_CAPABILITY:
        return None
    needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, facts.capability))
    return f"it needs compute capability {needed} or newer, and {facts.name} has {found}"
