"""Measures ours, the peers and the machine's ceilings in one run.

    adatape-kernels bench                               every op, a selection of shapes
    adatape-kernels bench tape_gather --shape "B=64 M=784" --device cuda
    adatape-kernels bench --quick                       about a minute

The README of the benchmarks says how to read the rows.
"""

import argparse
import contextlib
import functools
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from adatape_kernels.benchmarks.harness import ceilings, labels, records
from adatape_kernels.benchmarks.harness.cases import OURS, Effort, run
from adatape_kernels.benchmarks.harness.own_process import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CasesDone,
    in_own_process,
)
from adatape_kernels.benchmarks.harness.records import CaseKey, ResultRow
from adatape_kernels.benchmarks.harness.suites import Suite, legend, shape_text
from adatape_kernels.ops.op import NotServed

OPS = (
    "tape_select",
    "tape_gather",
    "tape_read",
    "elastic_attention",
    "dual_ffn",
    "compact_rows",
    "accumulate_rows",
    "model",
    "halting",
    "image_sizes",
    "dispatch",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXIT_UNREADABLE = 2


class BenchParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_UNREADABLE, f"{self.prog}: {message} (--help lists what there is)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; its help explains the letters of shapes."""
    made = BenchParser(
        prog="adatape-kernels bench",
        description=(__doc__ or "").partition("\n")[0],
        epilog="\n  ".join(["letters of a shape:", *legend()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default: all")
    add("--provider", action="append", default=[], metavar="NAME", help="only these; repeatable")
    add("--shape", action="append", default=[], metavar="SHAPE", help='as "B=16 N=197"; repeatable')
    add("--direction", action="append", default=[], metavar="NAME", help="only these; repeatable")
    add("--dtype", action="append", default=[], metavar="NAME", help=f"of {', '.join(DTYPES)}")
    add("--device", help="cpu or cuda; default: cuda if it is there")
    add("--threads", type=int, help="of the CPU; default: torch's")
    add("--out", type=Path, default=records.DEFAULT_OUT, help=OUT_HELP)
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about a minute")
    size.add_argument("--sweep", action="store_true", help="every size: hours")
    add("--compiled", choices=("yes", "no", "only"), help="providers that torch.compile makes")
    add("--budget", type=float, metavar="SECONDS", help="begin no new case after so long")
    return made


OUT_HELP = "folder, or CSV file; default: adatape-bench in the current directory"


def suites(names: Sequence[str]) -> dict[str, Suite]:
    """Return the suites of these ops, all if none is named.

    Raises:
        ValueError: an op is unknown.
    """
    for name in names:
        if name not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name!r}")
    folder = "adatape_kernels.benchmarks.ops"
    return {
        name: importlib.import_module(f"{folder}.bench_{name}").SUITE
        for name in OPS
        if not names or name in names
    }


class PlannedCase(NamedTuple):
    """A case that will be measured."""

    suite: Suite
    shape: Any
    direction: str
    dtype: torch.dtype
    compiles: bool
    """Providers that are compiled take part if this is set."""

    def run(self, device_type: str, effort: Effort) -> list[ResultRow]:
        """Measure the case and return its rows.

        A case that cannot be made, for lack of memory perhaps, has one row of ours that failed, so
        that the other cases are still measured. So has one that has ended a process before.
        """
        if not self.compiles:
            effort = effort._replace(compiled="no")
        if "" in effort.ended:
            return [self._row("failed", effort.ended[""], device_type)]
        try:
            case = self.suite.case(self.shape, self.direction, self.dtype, device_type)
            return run(case, effort)
        except NotServed as reason:
            status, note = "skipped", records.first_line(reason)
        except Exception as error:  # Out of memory, say.
            status, note = "failed", f"{type(error).__name__}: {records.first_line(error)}"
        return [self._row(status, note, device_type)]

    def _row(self, status: str, note: str, device_type: str) -> ResultRow:
        dtype, shape = records.dtype_name(self.dtype), shape_text(self.shape)
        key = CaseKey(self.suite.op, self.direction, dtype, shape)
        return records.row(key, OURS, device_type, status=status, note=note)


class BenchmarkPlan(NamedTuple):
    """What will be measured: it is checked, and nothing has run yet."""

    cases: list[PlannedCase]
    device_type: str
    effort: Effort
    path: Path


def plan(arguments: argparse.Namespace) -> BenchmarkPlan:
    """Check the arguments and return what they ask for.

    Raises:
        ValueError: an op, provider, shape, direction, dtype, device, number or place is not one
            of those that there are.
    """
    device_type = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device_type!r}")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is here, got cuda, and torch finds no GPU")
    found = suites(arguments.ops)
    if arguments.shape and len(found) > 1:
        raise ValueError(f"shape: expected one op to go with it, got {len(found)}")
    for what, names, known in (
        ("provider", arguments.provider, {p for s in found.values() for p in s.providers}),
        ("direction", arguments.direction, {d for s in found.values() for d in s.directions}),
        ("dtype", arguments.dtype, set(DTYPES)),
    ):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{what}: expected one of {'; '.join(sorted(known))}, got {name!r}"
                )
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"threads: expected 1 or more, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    return BenchmarkPlan(
        in_turn([list(planned_cases(suite, arguments, device_type)) for suite in found.values()]),
        device_type,
        Effort(
            rounds=5 if arguments.quick else 25,
            seconds=0.5 if arguments.quick else 2.5,
            quick=arguments.quick,
            compiled=arguments.compiled or ("no" if arguments.quick else "yes"),
            providers=frozenset(arguments.provider),
        ),
        records.destination(arguments.out, device_type),
    )


def planned_cases(
    suite: Suite, arguments: argparse.Namespace, device_type: str
) -> Iterator[PlannedCase]:
    """Yield the cases of a suite that the arguments ask for."""
    selection = suite.shapes(device_type)
    texts: list[tuple[str, bool]]
    if arguments.shape:
        texts = [(text, True) for text in arguments.shape]
    elif arguments.quick:
        texts = [(text, True) for text in selection.quick]
    else:
        most = selection.sweep if arguments.sweep else ()
        texts = [(text, True) for text in dict.fromkeys((*selection.default, *most))]
        texts += [(text, False) for text in selection.scaling]
    dtypes = [DTYPES[name] for name in arguments.dtype] or suite.dtypes(device_type)
    shapes = [(suite.parse(text), compiles) for text, compiles in texts]
    for shape, compiles in shapes:
        if arguments.compiled == "only" and not compiles:
            continue
        for dtype in dtypes:
            for direction in suite.directions:
                if not arguments.direction or direction in arguments.direction:
                    yield PlannedCase(suite, shape, direction, dtype, compiles)


def in_turn(lists: Sequence[list]) -> list:
    """Take from each list in turn, so that a run that is cut short has rows of every op."""
    longest = max(map(len, lists), default=0)
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


def measure(chosen: BenchmarkPlan, budget: float | None, progress: CasesDone) -> int:
    """Measure case by case from where a process before has come to; write each one's rows.

    Returns how many cases have a fault.
    """
    for dtype in dict.fromkeys(each.dtype for each in chosen.cases):
        limits = ceilings.measured(chosen.device_type, dtype, chosen.effort.quick)
        records.append(chosen.path, limits.rows)
        print(
            f"{records.machine(chosen.device_type).device}, {records.dtype_name(dtype)}: "
            f"copy {limits.bytes_per_s / 1e9:,.1f} GB/s, "
            f"product {limits.flops_per_s / 1e9:,.0f} GFLOP/s",
            flush=True,
        )
    print(heading(), flush=True)
    while progress.done < len(chosen.cases):
        if budget is not None and time.perf_counter() - progress.start > budget:
            print(f"{len(chosen.cases) - progress.done} cases left out: {budget:g} s are over")
            break
        ended = progress.ended_in(progress.done)
        effort = chosen.effort._replace(running=progress.runs, ended=ended)
        rows = chosen.cases[progress.done].run(chosen.device_type, effort)
        records.append(chosen.path, rows)
        print("\n".join(lines(rows)), flush=True)
        progress.case_done(any(map(is_fault, rows)))
    print(f"rows: {chosen.path}")
    return progress.faults


def is_fault(row: ResultRow) -> bool:
    """Return whether ours is wrong or failed, or any provider's label did not tell what ran."""
    if row.provider == OURS:
        return row.status in ("wrong", "failed")
    return row.status == "failed" and row.note.startswith(labels.PREFIX)


def heading() -> str:
    """Return the line above the rows."""
    columns = f"{'ms':>10} {'p20':>9} {'p80':>9} {'/ ours':>7} {'limit':>6}"
    return f"{'op, direction, dtype, shape':40} {columns}"


def lines(rows: Sequence[ResultRow]) -> list[str]:
    """Return a case as text: each provider's times, its time over ours, and its % of the limit."""
    if not rows:
        return []
    text = [" ".join(rows[0].case)]
    ours = next((r.median_s for r in rows if r.provider == OURS), None)
    for row in rows:
        if row.median_s is None or row.p20_s is None or row.p80_s is None:
            text.append(f"  {row.provider:38} {row.status}: {row.note}")
            continue
        ratio = f"{row.median_s / ours:7.2f}" if ours else f"{'':7}"
        share = f"{row.percent_of_limit:5.1f}%" if row.percent_of_limit else f"{'':6}"
        times = f"{row.median_s * 1e3:10.4f} {row.p20_s * 1e3:9.4f} {row.p80_s * 1e3:9.4f}"
        text.append(f"  {row.provider:38} {times} {ratio} {share}  {row.note}".rstrip())
    return text


def main(argv: Sequence[str] | None = None, progress: CasesDone | None = None) -> int:
    """Measure in this process what the arguments ask for and return the exit code.

    It is 1 if a case has a fault, 2 if the arguments cannot be followed, and 130 after Ctrl-C.

    Args:
        argv: the arguments; those of the process by default.
        progress: what processes before have measured; nothing by default.
    """
    arguments = parser().parse_args(argv)
    try:
        chosen = plan(arguments)
        faults = measure(chosen, arguments.budget, progress or CasesDone())
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    except KeyboardInterrupt:
        print("bench: interrupted; the rows of every finished case are kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILED if faults else 0


def program(argv: Sequence[str]) -> int:
    """Do what `main` does in a process of its own, which a provider may end; see `own_process`."""
    # What each of them would import; a wrong op is an error that they say.
    with contextlib.suppress(ValueError):
        suites(parser().parse_args(argv).ops)
        importlib.import_module("torch._dynamo")
    return in_own_process(functools.partial(main, argv))


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
