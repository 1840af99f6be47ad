"""How many blocks of a kernel a multiprocessor holds at once, and how often a launch fills a GPU.

The limits are those of the tables "Technical Specifications per Compute Capability" in NVIDIA's
CUDA programming guide; the units in which registers and shared memory are allotted are those of
cuda_occupancy.h, a header of the CUDA toolkit, whose arithmetic this is.
"""

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536
"""32-bit registers of a multiprocessor, and the most that a block may take."""
MOST_REGISTERS = 255
"""Registers that a thread may have."""
REGISTER_UNIT = 256
"""A warp is allotted a multiple of so many registers."""
PARTITIONS = 4
"""A multiprocessor has four parts, each with a quarter of the registers; a warp lies in one."""
SHARED_UNIT = 128
"""A block is allotted a multiple of so many bytes of shared memory."""
RESERVED_SHARED = 1 << 10
"""Bytes of shared memory that the driver takes for each block."""


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor of a compute capability holds, and how many of them a GPU has."""

    gpu: str
    multiprocessors: int
    warps: int
    blocks: int
    shared: int
    """Bytes of shared memory."""

    @property
    def shared_per_block(self) -> int:
        """Bytes of shared memory that one block may ask for."""
        return self.shared - RESERVED_SHARED

    def blocks_at_once(self, registers: int, num_warps: int, shared: int) -> int:
        """Return how many blocks a multiprocessor holds at once; 0 if it cannot hold one.

        Args:
            registers: of a thread.
            num_warps: of a block.
            shared: bytes of shared memory of a block.
        """
        of_a_warp = round_up(registers * WARP, REGISTER_UNIT)
        # A block starts only if its registers would fit with its warps spread over all parts.
        if of_a_warp * round_up(num_warps, PARTITIONS) > REGISTERS:
            return 0
        warps_at_once = REGISTERS // PARTITIONS // max(of_a_warp, 1) * PARTITIONS
        taken = round_up(shared + RESERVED_SHARED, SHARED_UNIT)
        if taken > self.shared:
            return 0
        return min(
            self.blocks,
            min(self.warps, warps_at_once if registers else self.warps) // num_warps,
            self.shared // taken,
        )

    def waves(self, programs: int, blocks_at_once: int) -> float:
        """Return how many times a launch of so many programs fills the GPU."""
        return programs / (self.multiprocessors * blocks_at_once) if blocks_at_once else 0.0


def round_up(number: int, unit: int) -> int:
    """Return the least multiple of a unit that is no smaller."""
    return -(-number // unit) * unit


CHIPS = {
    80: Chip("A100", 108, 64, 32, 164 << 10),
    86: Chip("A10", 72, 48, 16, 100 << 10),
    89: Chip("L4", 58, 48, 24, 100 << 10),
    90: Chip("H100 SXM", 132, 64, 32, 228 << 10),
    100: Chip("B200", 148, 64, 32, 228 << 10),
    120: Chip("RTX 5090", 170, 48, 24, 100 << 10),
}
"""By compute capability, ten times major and minor, with a GPU that has it."""
