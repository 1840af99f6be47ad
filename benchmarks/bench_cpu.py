"""Measures the CPU kernels beside the goals that they were given.

    python -m adatape_kernels.benchmarks.bench_cpu --quick
    python -m adatape_kernels.benchmarks.bench_cpu --only halting      about twelve minutes

The cases are those of bench_<op>.py, with the peers that a goal names. What counts are ratios of
medians, and the last column says which goals are met.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adatape_kernels.benchmarks.harness import ceilings, command, records
from adatape_kernels.benchmarks.harness.cases import OURS, BenchmarkCase, Effort, run
from adatape_kernels.benchmarks.harness.suites import Suite, for_products
from adatape_kernels.benchmarks.ops import (
    bench_compact_rows,
    bench_dispatch,
    bench_dual_ffn,
    bench_elastic_attention,
    bench_halting,
    bench_model,
    bench_tape_read,
)
from adatape_kernels.benchmarks.ops.bench_halting import HaltingInputs
from adatape_kernels.benchmarks.ops.bench_model import ModelInputs

DISPATCH_LIMIT = 20e-6
MASKED, INDEXED, COPY = "masked", "x[mask]", "copy_ (anchor)"


class CpuGoal(NamedTuple):
    """How many times faster than each peer ours has to be in one case."""

    suite: Suite
    shape: str
    direction: str
    dtype: torch.dtype
    ratios: dict[str, float]


class GoalOutcome(NamedTuple):
    """What was reached of a goal."""

    case: str
    ratio: float
    goal: float

    def line(self) -> str:
        """Return the outcome as a line of the table."""
        verdict = "ok" if self.ratio >= self.goal else "MISSED"
        return f"{self.case:104} {self.ratio:7.2f} {self.goal:7.2f}  {verdict}"


def goals(whole_models: bool) -> Iterator[CpuGoal]:
    """Yield every goal, those of whole models only if asked."""
    for shape in bench_dispatch.SUITE.shapes("cpu").default:
        yield CpuGoal(bench_dispatch.SUITE, shape, "forward", torch.float32, {})
    for shape in ("B=64 M=784 bank=input", "B=64 M=10000 bank=learn"):
        read = bench_tape_read.SUITE
        yield CpuGoal(read, shape, "forward+backward", torch.float32, {"eager": 5.0})
    for heads in (6, 12):
        for rows, goal in (("50-246", 1.5), ("197", 0.95)):
            for dtype in for_products("cpu"):
                for direction in bench_elastic_attention.DIRECTIONS:
                    yield CpuGoal(
                        bench_elastic_attention.SUITE,
                        f"B=16 N={rows} T=10 H={heads}",
                        direction,
                        dtype,
                        {"padded SDPA": goal, "SDPA each": 1.0},
                    )
    for dtype in for_products("cpu"):
        shape = "B=16 N=197 T=10"
        yield CpuGoal(bench_dual_ffn.SUITE, shape, "forward+backward", dtype, {"sliced": 1.0})
    for dtype in for_products("cpu"):
        for shape in bench_compact_rows.SUITE.shapes("cpu").default:
            yield CpuGoal(bench_compact_rows.SUITE, shape, "forward", dtype, {COPY: 0.6})
    models = ("V=S/16 B=8 T=10 k=5 tau=2", "V=B/32 B=8 T=64 k=2 tau=8 bank=learn")
    for shape in models if whole_models else ():
        for direction in bench_model.SUITE.directions:
            # The ratio that is asked for follows from the rows that are saved.
            yield CpuGoal(bench_model.SUITE, shape, direction, torch.float32, {"padded": 0.95})
    for shape, dtype in halting_cases() if whole_models else ():
        for direction in bench_halting.SUITE.directions:
            # Here too rows are saved. The other peer has no goal, and is recorded at small batches.
            small = bench_halting.SUITE.parse(shape).B <= 8
            goal = {MASKED: 0.9, INDEXED: 0.0} if small else {MASKED: 0.9}
            yield CpuGoal(bench_halting.SUITE, shape, direction, dtype, goal)


def halting_cases() -> Iterator[tuple[str, torch.dtype]]:
    """Yield the shapes and dtypes in which halting models have goals: large batches in float32."""
    selection = bench_halting.SUITE.shapes("cpu")
    for shape in (*selection.default, *selection.scaling):
        for dtype in for_products("cpu"):
            if dtype == torch.float32 or bench_halting.SUITE.parse(shape).B <= 8:
                yield shape, dtype


def outcomes(
    goal: CpuGoal, case: BenchmarkCase, rows: dict[str, records.ResultRow]
) -> Iterator[GoalOutcome]:
    """Compare a case's rows with the goal, which a row without a time misses."""
    name = " ".join(case.key)
    ours = rows[OURS]
    if goal.suite is bench_dispatch.SUITE:
        took = ours.median_s or float("inf")
        yield GoalOutcome(f"{name}: {took * 1e6:.1f} us, goal 20 us", DISPATCH_LIMIT / took, 1.0)
    for peer, ratio in goal.ratios.items():
        if ratio == 0:
            continue
        asked = ratio
        if goal.suite is bench_model.SUITE:
            asked *= saved_rows(case.inputs())
        elif goal.suite is bench_halting.SUITE:
            asked = halting_goal(case.inputs(), ratio)
        for quantity in ("median_s", "peak_bytes") if case.peaks else ("median_s",):
            mine, theirs = (getattr(row, quantity) for row in (ours, rows[peer]))
            found = theirs / mine if mine and theirs else 0.0
            memory = quantity == "peak_bytes"
            label = f"{name}{' peak memory' if memory else ''} / {peer}"
            yield GoalOutcome(label, found, 1.0 if memory else asked)


def saved_rows(given: ModelInputs) -> float:
    """Return the padded model's rows over the elastic one's."""
    config: Any = given.model.config
    inputs = len(given.images) * (config.num_patches + 1)
    padded = inputs + len(given.images) * config.num_tape_tokens
    return padded / (inputs + given.tape_rows)


def halting_goal(given: HaltingInputs, ratio: float) -> float:
    """Return the ratio that is asked for, by the rows that are spared; 1 / 1.05 if none are."""
    share = bench_halting.computed_share(given)
    return 1 / 1.05 if share == 1 else ratio / share


def main(argv: Sequence[str] | None = None) -> int:
    """Print every goal with what was reached, and record the rows.

    Returns 2 if the rows cannot be written.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, no whole models")
    parser.add_argument("--only", metavar="OP", help="the goals of one op, whole models included")
    parser.add_argument("--out", type=Path, default=records.DEFAULT_OUT, help=command.OUT_HELP)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.only is not None:
            command.suites([arguments.only])
        path = records.destination(arguments.out, "cpu")
    except ValueError as error:
        print(f"bench_cpu: {error}", file=sys.stderr)
        return command.EXIT_UNREADABLE
    effort = Effort(5, 1.0, quick=True) if arguments.quick else Effort(15, 6.0)
    found: list[GoalOutcome] = []
    recorded = set()
    print(f"{'case / peer':104} {'ratio':>7} {'goal':>7}")
    for goal in goals(whole_models=not arguments.quick or arguments.only is not None):
        if arguments.only not in (None, goal.suite.op):
            continue
        if goal.dtype not in recorded:
            recorded.add(goal.dtype)
            records.append(path, ceilings.measured("cpu", goal.dtype, effort.quick).rows)
        case = goal.suite.case(goal.suite.parse(goal.shape), goal.direction, goal.dtype, "cpu")
        rows = run(case, effort._replace(providers=frozenset([OURS, *goal.ratios])))
        records.append(path, rows)
        for outcome in outcomes(goal, case, {row.provider: row for row in rows}):
            found.append(outcome)
            print(outcome.line(), flush=True)
    met = sum(outcome.ratio >= outcome.goal for outcome in found)
    print(f"\n{met} of {len(found)} goals met\nrows: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
