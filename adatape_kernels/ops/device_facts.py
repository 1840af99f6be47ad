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
    shared_memory_per_multiprocessor: int
    """Bytes that the blocks of one multiprocessor share."""
    multiprocessors: int


EMULATED = DeviceFacts("no GPU is here: as compute capability 9.0", 227 * KIB, 228 * KIB, 4)
"""What stands in for a GPU where none is: in Triton's interpreter, and in what `info` says of one.

The few multiprocessors let each program of a persistent kernel walk several tiles, as on a GPU.
"""


@functools.cache
def facts_of(device: torch.device) -> DeviceFacts:
    """Return the facts of a GPU, or of what stands in for one."""
    if device.type != "cuda":
        return EMULATED
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        found.name,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        found.shared_memory_per_multiprocessor,
        found.multi_processor_count,
    )
