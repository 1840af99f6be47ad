"""Builds, tests and measures on a machine with a GPU, within minutes: make gpu.

    python -m adatape_kernels.benchmarks.gpu --out results-of-this-machine --minutes 7.5

It runs in a clone and needs a CUDA build of torch, nvcc, numpy and pytest; it builds in place and
installs nothing. Each step has its share of the time and is stopped at its end. What was measured
until then stays, since the rows of a case are written when it ends. The exit code is 1 if a step
failed; the table is printed all the same.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.reports import result_tables

ROOT = Path(__file__).parents[1]
EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130
LAST_SECONDS = 10
"""So much of the time is kept for the table."""

SECONDS = "{seconds}"
"""In a command this stands for most of the time of its step, so that it ends by itself."""


class GpuStep(NamedTuple):
    """A command with its share of the time that is left when it starts."""

    name: str
    command: Sequence[str]
    share: float
    may_be_cut: bool
    """A step that may be cut has not failed when it was stopped: what it did is of use."""


class StepOutcome(NamedTuple):
    """How a step ended."""

    step: GpuStep
    code: int | None
    """The exit code is None if the step was stopped."""
    seconds: float

    @property
    def failed(self) -> bool:
        return not self.step.may_be_cut if self.code is None else self.code != 0

    def line(self) -> str:
        """Return the outcome as a line of the last table."""
        state = "out of time" if self.code is None else f"exit {self.code}" if self.code else "ok"
        return f"{self.step.name:24} {state:12} {self.seconds:5.0f} s"


def steps(device: str, out: Path, tests: str) -> list[GpuStep]:
    """Return the steps in their order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    if find_spec("xdist") and "-n" not in pytest:
        pytest += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    bench = [python, "-m", "adatape_kernels.cli", "bench", "--device", device, "--out", str(out)]
    budget = ["--budget", SECONDS]
    return [
        GpuStep("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 0.35, False),
        GpuStep(
            "check", [python, "-m", "adatape_kernels.cli", "check", "--device", device], 0.2, False
        ),
        GpuStep("tests", pytest, 0.5, False),
        GpuStep("benchmarks", [*bench, "--compiled", "no", *budget], 0.65, True),
        GpuStep("compiled peers", [*bench, "--compiled", "only", *budget], 1.0, True),
    ]


def run(step: GpuStep, log: Path, seconds: float) -> StepOutcome:
    """Run a step in a process group of its own, which is killed when its time is over."""
    command = [part.replace(SECONDS, f"{0.9 * seconds:.0f}") for part in step.command]
    print(f"{step.name}: {shlex.join(command)}  (at most {seconds:.0f} s, {log})", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = StepOutcome(step, code, time.monotonic() - start)
    if outcome.failed:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(outcome.line(), flush=True)
    return outcome


def table(device: str, out: Path) -> str:
    """Return the Markdown table of the rows that are there."""
    from adatape_kernels.benchmarks.harness import records

    path = records.destination(out, device)
    return result_tables.summary(result_tables.entries(records.read(path))) + f"\nrows: {path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and print the table, whatever became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, default=records.DEFAULT_OUT)
    parser.add_argument("--minutes", type=float, default=7.5, help="of everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tests", default="-m cuda", help="arguments of pytest; default: -m cuda")
    parser.add_argument("--only", nargs="*", metavar="STEP", help="run these steps only")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes - LAST_SECONDS
    out = arguments.out.resolve()
    if not (ROOT / "setup.py").exists():
        print(f"gpu: expected a clone of the repository, got {ROOT}", file=sys.stderr)
        return EXIT_UNREADABLE
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.log").touch()
    except OSError as error:
        print(f"gpu: expected a folder to write to, got {out}: {error.strerror}", file=sys.stderr)
        return EXIT_UNREADABLE
    outcomes = []
    try:
        for step in steps(arguments.device, out, arguments.tests):
            if arguments.only and step.name not in arguments.only:
                continue
            left = end - time.monotonic()
            log = out / f"{step.name.replace(' ', '-')}.log"
            outcomes.append(run(step, log, step.share * left))
    except KeyboardInterrupt:
        print("gpu: interrupted; the rows of every finished case are kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    print()
    try:
        print(table(arguments.device, out))
    except ValueError as error:
        print(f"no table: {error}")
    print("\n".join(outcome.line() for outcome in outcomes))
    return EXIT_FAILED if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
