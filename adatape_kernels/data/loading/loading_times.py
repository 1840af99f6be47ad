"""How long training waited for its batches, and how fast they were prepared."""

import time
from collections.abc import Callable

STARVING_SHARE = 0.2
"""The share of the time, spent waiting for data, from which on a loader is named as too slow."""


class LoadingTimes:
    """What the batches of an epoch took, as far as it has come.

    Args:
        workers: number of processes that prepare batches, 0 where training itself does.
        clock: returns the time in seconds.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter):
        self.workers = workers
        self.images = 0
        self.waited = 0.0
        """Seconds in which training had no batch."""
        self.prepared = 0.0
        """Seconds that preparing took, in all processes together."""
        self._clock = clock
        self._begun = clock()
        self._asked = self._begun

    def ask(self) -> None:
        """Note that training has nothing to do until a batch comes."""
        self._asked = self._clock()

    def receive(self, images: int, seconds: float) -> None:
        """Note that a batch came, with its number of images and what it took to prepare."""
        self.waited += self._clock() - self._asked
        self.images += images
        self.prepared += seconds

    @property
    def images_per_second(self) -> float:
        """What the loader would give if nothing waited for the model: that of all its processes.

        It is measured beside training, which may have shared the processor's cores with them.
        """
        return self.images * max(1, self.workers) / self.prepared if self.prepared else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of the time, 0 to 1, in which training waited for a batch.

        A GPU may have been computing meanwhile, as the host runs ahead of it.
        """
        passed = self._clock() - self._begun
        return self.waited / passed if passed else 0.0

    def stop(self) -> None:
        """Stop the clock at the end of the epoch."""
        now = self._clock()
        self._clock = lambda: now

    def postfix(self) -> dict[str, str]:
        """Return what a progress bar says of a loader that is too slow; nothing of another."""
        return {"waiting for data": f"{self.waiting_share:.0%}"} if self.starving else {}

    def line(self) -> str:
        """Return what is said after an epoch."""
        line = f"the loader alone {self.images_per_second:,.0f} images/s"
        if not self.starving:
            return line
        return f"{line}; training waited for data {self.waiting_share:.0%} of the time (--workers)"

    @property
    def starving(self) -> bool:
        """Whether the loader is too slow for the model."""
        return self.waiting_share >= STARVING_SHARE
