"""Blocks of a multiprocessor, as cuda_occupancy.h of CUDA 13.0 counts them."""

import pytest

from adatape_kernels.benchmarks.audit.occupancy import CHIPS

# The header's cudaOccMaxActiveBlocksPerMultiprocessor was compiled and asked, with 1 KiB of shared
# memory reserved for a block, for compute capability 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0.
KNOWN = [  # registers a thread, warps and bytes of shared memory a block: blocks
    ((92, 16, 4096), (1, 1, 1, 1, 1, 1)),
    ((92, 8, 4096), (2, 2, 2, 2, 2, 2)),
    ((106, 4, 40960), (4, 2, 2, 4, 4, 2)),
    ((102, 4, 57344), (2, 1, 1, 4, 4, 1)),
    ((146, 4, 33024), (3, 3, 3, 3, 3, 3)),
    ((32, 4, 0), (16, 12, 12, 16, 16, 12)),
    ((16, 1, 0), (32, 16, 24, 32, 32, 24)),
    ((255, 8, 0), (1, 1, 1, 1, 1, 1)),
    ((168, 12, 100_000), (1, 1, 1, 1, 1, 1)),
    ((64, 4, 24576), (6, 4, 4, 8, 8, 4)),
    ((64, 32, 0), (1, 1, 1, 1, 1, 1)),
    ((65, 32, 0), (0, 0, 0, 0, 0, 0)),
    ((40, 6, 2048), (8, 8, 8, 8, 8, 8)),
    ((24, 3, 512), (21, 16, 16, 21, 21, 16)),
    ((128, 4, 103_000), (1, 0, 0, 2, 2, 0)),
    ((128, 4, 50176), (3, 2, 2, 4, 4, 2)),
]


@pytest.mark.parametrize(("kernel", "blocks"), KNOWN)
def test_blocks_are_those_of_the_toolkit(kernel, blocks):
    assert tuple(chip.blocks_at_once(*kernel) for chip in CHIPS.values()) == blocks


def test_waves_are_of_all_multiprocessors():
    h100 = CHIPS[90]
    assert h100.waves(132 * 4 * 3, 4) == 3 and h100.waves(66, 1) == 0.5
    assert h100.waves(5, 0) == 0  # a kernel that does not fit does not run
