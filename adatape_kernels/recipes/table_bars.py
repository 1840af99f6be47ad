"""The progress of a table of runs: a bar for the table, and one for each run that is at work.

A terminal has the bars. A log file, in which they cannot move, gets a line of a run now and then.
"""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 20.0


class TableBars:
    """Bars on standard error.

    Args:
        total: number of runs of the table, or what else its bar counts.
        done: how much of that is there already.
        title: stands before the table's bar.
        form: how tqdm shows the table's bar; None for runs that are counted.
    """

    def __init__(
        self, total: float, done: float = 0, *, title: str = "table", form: str | None = None
    ):
        from tqdm import tqdm

        self._moving = sys.stderr.isatty()
        interval = 0.1 if self._moving else _SECONDS_BETWEEN_LINES
        self._options: dict[str, Any] = dict(mininterval=interval, dynamic_ncols=True)
        self._bar = tqdm
        self._last_line: dict[str, float] = {}
        self._table = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=" runs",
            position=0,
            bar_format=form,
            **self._options,
        )
        self._runs: dict[str, Any] = {}

    def __enter__(self) -> "TableBars":
        """Return the bars, which end with the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all bars."""
        for bar in [*self._runs.values(), self._table]:
            bar.close()

    def move(self, run: str, steps: int, of: int, shown: Mapping[str, str]) -> None:
        """Show how far a run is.

        Args:
            run: its name.
            steps: number of steps behind it.
            of: number of all its steps.
            shown: what stands beside the bar, such as the loss; empty texts are left out of lines.
        """
        if not self._moving:
            self._write_line(run, steps, of, shown)
            return
        bar = self._runs.get(run)
        if bar is None:
            taken = {bar.pos for bar in self._runs.values()}
            free = next(place for place in range(1, len(taken) + 2) if -place not in taken)
            bar = self._runs[run] = self._bar(
                total=of, desc=run, unit=" steps", position=free, leave=False, **self._options
            )
        bar.set_postfix(shown, refresh=False)
        bar.update(steps - bar.n)

    def _write_line(self, run: str, steps: int, of: int, shown: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self._last_line.get(run, now - _SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES:
            self._last_line[run] = now
            parts = [f"step {steps} of {of}", *(f"{n} {text}" for n, text in shown.items() if text)]
            self.write(f"{run}: {', '.join(parts)}")

    def write(self, line: str) -> None:
        """Write a line that stays."""
        self._table.write(line, file=sys.stderr)

    def end(self, run: str, line: str) -> None:
        """Take a run's bar away, and write a line that stays."""
        bar = self._runs.pop(run, None)
        if bar is not None:
            bar.close()
        self.write(f"{run}: {line}")

    def advance(self, amount: float = 1, beside: str | None = None) -> None:
        """Move the table's bar on, and replace the text beside it."""
        if beside is not None:
            self._table.set_postfix_str(beside, refresh=False)
        # Amounts that are no integers may add up to a little more than the whole.
        self._table.update(min(amount, self._table.total - self._table.n))
