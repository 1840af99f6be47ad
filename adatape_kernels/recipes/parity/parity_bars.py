"""The progress of the parity table: a bar for the table, and one for each run that is at work.

A terminal has the bars. A log file, in which they cannot move, gets a line of a run now and then.
"""

import sys
import time
from types import TracebackType
from typing import Any

from adatape_kernels.recipes.parity.parity_config import Run
from adatape_kernels.recipes.parity.parity_workers import Finished, Progress

_SECONDS_BETWEEN_LINES = 20.0


class ParityBars:
    """Bars on standard error.

    Args:
        runs: number of runs of the table.
        done: how many of them are there already.
        steps: number of steps of a run.
    """

    def __init__(self, runs: int, done: int, steps: int):
        from tqdm import tqdm

        self._moving = sys.stderr.isatty()
        interval = 0.1 if self._moving else _SECONDS_BETWEEN_LINES
        self._options: dict[str, Any] = dict(mininterval=interval, dynamic_ncols=True)
        self._bar = tqdm
        self._last_line: dict[Run, float] = {}
        self._steps = steps
        self._table = tqdm(
            total=runs, initial=done, desc="table", unit=" runs", position=0, **self._options
        )
        self._runs: dict[Run, Any] = {}

    def __enter__(self) -> "ParityBars":
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

    def move(self, progress: Progress) -> None:
        """Show how far a run is."""
        accuracy = "" if progress.accuracy is None else f"{progress.accuracy:.1%}"
        if not self._moving:
            self._write_line(progress, accuracy)
            return
        bar = self._runs.get(progress.run)
        if bar is None:
            taken = {bar.pos for bar in self._runs.values()}
            free = next(place for place in range(1, len(taken) + 2) if -place not in taken)
            bar = self._runs[progress.run] = self._bar(
                total=self._steps,
                desc=progress.run.stem,
                unit=" steps",
                position=free,
                leave=False,
                **self._options,
            )
        bar.set_postfix(loss=f"{progress.loss:.3f}", accuracy=accuracy, refresh=False)
        bar.update(progress.steps - bar.n)

    def _write_line(self, progress: Progress, accuracy: str) -> None:
        now = time.monotonic()
        if now - self._last_line.get(progress.run, now - _SECONDS_BETWEEN_LINES) >= (
            _SECONDS_BETWEEN_LINES
        ):
            self._last_line[progress.run] = now
            self._write(
                f"{progress.run.stem}: step {progress.steps} of {self._steps}, "
                f"loss {progress.loss:.3f}{', accuracy ' if accuracy else ''}{accuracy}"
            )

    def _write(self, line: str) -> None:
        self._table.write(line, file=sys.stderr)

    def end(self, finished: Finished) -> None:
        """Take a run's bar away, and write a line that stays."""
        bar = self._runs.pop(finished.run, None)
        if bar is not None:
            bar.close()
        result = finished.result
        self._write(f"{finished.run.stem}: {result.accuracy:.2%} in {result.seconds:.0f} s")
        self._table.update()
