"""How fast the loaders of several processes are together."""

from dataclasses import dataclass

from adatape_kernels.data.loading import LoadingTimes
from adatape_kernels.data.loading.loading_times import STARVING_SHARE
from adatape_kernels.recipes.distributed.ranks import Ranks


@dataclass(frozen=True)
class LoadingOfRanks:
    """What the loaders of all ranks took in an epoch.

    Example:
        >>> from adatape_kernels.recipes.distributed.loading_of_ranks import LoadingOfRanks
        >>> LoadingOfRanks(2, 340.0, 0.05).line()
        'the loaders of 2 ranks alone 340 images/s'
    """

    processes: int
    """Number of ranks."""
    images_per_second: float
    """The sum of what each rank's loader would give if nothing waited for the model."""
    waiting_share: float
    """The share of the time, 0 to 1, in which the rank that waited longest had no batch."""

    def line(self) -> str:
        """Return what is said after an epoch."""
        line = f"the loaders of {self.processes} ranks alone {self.images_per_second:,.0f} images/s"
        if self.waiting_share < STARVING_SHARE:
            return line
        return f"{line}; a rank waited for data {self.waiting_share:.0%} of the time (--workers)"


def loading_of(times: LoadingTimes, ranks: Ranks) -> LoadingTimes | LoadingOfRanks:
    """Return how fast the loaders were in an epoch; several ranks call this together.

    Args:
        times: those of this rank's loader.
        ranks: the processes.
    """
    if not ranks.several:
        return times
    found = ranks.gathered([(times.images_per_second, times.waiting_share)])
    speeds, shares = zip(*found, strict=True)
    return LoadingOfRanks(ranks.count, sum(speeds), max(shares))
