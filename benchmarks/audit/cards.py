"""What GPUs can do, from their makers' data sheets, and the time that counted work takes there."""

from dataclasses import dataclass

from adatape_kernels.benchmarks.audit.work_counter import CountedWork

MEMORY_SHARE, PRODUCT_SHARE = 0.87, 0.78
"""The shares of the data sheet's rates that a copy and torch's product of 8,192 reached on an H200.

benchmarks/results/nvidia-h200.csv has both: 4,192 of 4,800 GB/s, and 774 of 989 TFLOP/s.
"""
LAUNCH = 2e-6
"""Seconds that a kernel costs within a CUDA graph, however little it does; assumed."""


@dataclass(frozen=True)
class Card:
    """A GPU: bytes a second of its memory and of its L2 cache, bfloat16 FLOPs a second, dense.

    Makers do not state the L2's rate. These are of the size that published measurements of such
    cards find, and count as assumptions.
    """

    name: str
    memory: float
    l2: float
    products: float
    arch: int
    """Compute capability, as occupancy.CHIPS has it."""

    def floor(self, work: CountedWork) -> float:
        """Return the least seconds that the data sheet allows for this work."""
        return max(work.bytes / self.memory, work.flops / self.products)

    def predicted(self, work: CountedWork) -> float:
        """Return the seconds of this work if its launches, and nothing else, wait for each other.

        Memory and products run at the shares above, and at the same time; what a multiprocessor
        waits for (latency, barriers, a tail of few blocks) is not in it.
        """
        return work.launches * LAUNCH + max(
            work.bytes / (MEMORY_SHARE * self.memory),
            work.accessed / self.l2,
            work.flops / (PRODUCT_SHARE * self.products),
        )


H200 = Card("H200", 4.8e12, 5.7e12, 989e12, 90)
CARDS = (
    Card("A100", 2.04e12, 4.5e12, 312e12, 80),
    Card("L4", 0.30e12, 1.8e12, 121e12, 89),
    Card("H100", 3.35e12, 5.7e12, 989e12, 90),
    H200,
    Card("B200", 8.0e12, 10e12, 2250e12, 100),
)
"""A100 and H100 are the SXM forms, with 80 GB."""
