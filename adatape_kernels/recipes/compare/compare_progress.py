"""The bar of the whole comparison, and the time that is left."""

import time

from adatape_kernels.recipes.compare.compare_config import time_text
from adatape_kernels.recipes.table_bars import TableBars

FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far{postfix}"
"""How the bar is shown, whose units mean nothing to a reader."""

COUNT_FORM = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}, {elapsed} so far"
"""How a bar is shown that counts."""

# The share of the work after which the pace so far counts as much as what was foreseen.
_TRUST = 0.1


class CompareProgress:
    """Moves a bar that counts the seconds of work that were foreseen.

    Args:
        bars: where the bar is.
        seconds: what is foreseen for all work that is to be done.
    """

    def __init__(self, bars: TableBars, seconds: float):
        self._bars, self._seconds, self._done = bars, seconds, 0.0
        self._started = time.monotonic()

    def advance(self, seconds: float, beside: str) -> None:
        """Say that work is done for which so many seconds were foreseen.

        Args:
            seconds: those that were foreseen, however long it took.
            beside: what stands beside the time that is left.
        """
        self._done += seconds
        trusted = max(_TRUST * self._seconds, 1e-9)
        elapsed = time.monotonic() - self._started
        pace = (elapsed + trusted) / (self._done + trusted)
        left = pace * max(0.0, self._seconds - self._done)
        self._bars.advance(seconds, f"about {time_text(left)} left, {beside}")
