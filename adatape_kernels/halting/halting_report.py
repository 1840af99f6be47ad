"""How many rows each step of a loop computed, in how many FLOPs and milliseconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels.arguments import check_int, shown
from adatape_kernels.halting.state import HaltingState
from adatape_kernels.halting.step_recording import listening


@dataclass(frozen=True)
class StepReport:
    """One step of a loop, and what came before it since the step before.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=5)
        >>> report = ak.halting.report(model, torch.zeros(2, 3, 32, 32))
        >>> report.steps[0].examples, report.steps[0].rows
        (2, 10)
    """

    step: int
    """Its number, from 1 on."""
    examples: int
    """Number of examples in the batch that it computed."""
    rows: int
    """Number of rows that it computed."""
    flops: int
    """Floating-point operations of the forward pass, by torch's counter."""
    milliseconds: float
    """Median of its times."""


@dataclass(frozen=True)
class HaltingReport:
    """What a call of a model took, step by step; `str` makes a table of it.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=5)
        >>> report = ak.halting.report(model, torch.zeros(2, 3, 32, 32))
        >>> len(report.steps), report.rows, report.share
        (4, 40, 1.0)
    """

    steps: tuple[StepReport, ...]
    """The steps of all loops in the order in which they ran."""
    rows: int
    """Number of rows that the steps would have computed if none had left."""

    @property
    def share(self) -> float:
        """The share of the rows that was computed; 1 where there are none."""
        return sum(step.rows for step in self.steps) / self.rows if self.rows else 1.0

    def __str__(self) -> str:
        """Return a table of the steps, and a line that sums them up."""
        lines = [f"{'step':>4} {'examples':>9} {'rows':>9} {'GFLOP':>9} {'ms':>9}"]
        lines += [
            f"{s.step:4d} {s.examples:9,d} {s.rows:9,d} {s.flops / 1e9:9.3f} {s.milliseconds:9.2f}"
            for s in self.steps
        ]
        rows, flops = (sum(getattr(s, name) for s in self.steps) for name in ("rows", "flops"))
        milliseconds = sum(s.milliseconds for s in self.steps)
        lines.append(f"{'all':>4} {'':9} {rows:9,d} {flops / 1e9:9.3f} {milliseconds:9.2f}")
        lines.append(f"{100 * self.share:.1f} % of {self.rows:,d} rows were computed")
        return "\n".join(lines)


class _Event(NamedTuple):
    """A loop has begun or taken a step; only numbers, so that no batch is kept."""

    begins: bool
    examples: int
    """Those of the batch that the next step computes."""
    rows: int
    """Those that the last step computed."""
    initial_rows: int
    flops: int
    seconds: float


def report(function: Callable[..., Any], *arguments: Any, repeats: int = 3) -> HaltingReport:
    """Run a function and say what each halting step within it took.

    It runs once to count FLOPs, and `repeats` times to take times, of which medians are returned.

    Args:
        function: a model, or anything that runs loops of `Halting.step` on this thread, and does
            the same each time.
        arguments: what it is called with.
        repeats: number of timed runs, at least 1.

    Raises:
        TypeError: function cannot be called, or repeats is no whole number.
        ValueError: repeats is below 1, or runs differ in their number of steps.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> def model(images):
        ...     rule = ak.halting.Halting.act()
        ...     state = rule.start(ak.ElasticBatch.from_padded(images))
        ...     for p in ([0.5, 1.0], [1.0]):
        ...         state = rule.step(state, torch.tensor(p), state.batch.data @ torch.ones(4, 4))
        >>> report = ak.halting.report(model, torch.ones(2, 3, 4))
        >>> [step.rows for step in report.steps], report.steps[0].flops, report.share
        ([6, 3], 264, 0.75)
    """
    if not callable(function):
        raise TypeError(f"function: expected one that can be called, got {shown(function)}")
    repeats = check_int("repeats", repeats, 1)
    counter = FlopCounterMode(display=False)
    with counter:
        counted = _run(function, arguments, counter)
    timed = [_run(function, arguments, None) for _ in range(repeats)]
    for events in timed:
        if len(events) != len(counted):
            raise ValueError(
                f"function: expected one that takes the same steps each time, got "
                f"{_steps_of(counted)} and {_steps_of(events)}"
            )
    steps: list[StepReport] = []
    rows = 0
    for i, event in enumerate(counted):
        if event.begins:
            continue
        before = counted[i - 1]
        seconds = statistics.median(run[i].seconds - run[i - 1].seconds for run in timed)
        flops = event.flops - before.flops
        rows += event.initial_rows
        steps.append(StepReport(len(steps) + 1, before.examples, event.rows, flops, 1e3 * seconds))
    return HaltingReport(tuple(steps), rows)


def _steps_of(events: Sequence[_Event]) -> int:
    """Return the number of steps among events, which are beginnings of loops otherwise."""
    return sum(not event.begins for event in events)


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], counter: FlopCounterMode | None
) -> list[_Event]:
    events: list[_Event] = []

    def heard(state: HaltingState) -> None:
        if state.batch.device.type == "cuda":
            torch.cuda.synchronize(state.batch.device)
        flops = counter.get_total_flops() if counter is not None else 0
        ran, initial_rows = state.rows_per_step, state.initial.data.shape[0]
        events.append(
            _Event(
                not ran,
                state.batch.batch,
                ran[-1] if ran else 0,
                initial_rows,
                flops,
                time.perf_counter(),
            )
        )

    with listening(heard):
        function(*arguments)
    return events
