"""Builds, tests and measures on a machine with a GPU, within minutes: make gpu.

    python -m adatape_kernels.benchmarks.gpu --out results-of-this-machine --minutes 7.5

It runs in a clone and needs a CUDA build of torch, nvcc, numpy and pytest; it builds in place and
installs nothing. Each step has its share of the time and is cut at its end. What was done until
then counts: a fault that the step has told of by then is a failure, and the rows of a case are
written when it ends. The exit code is 1 if a step failed; the table is printed all the same.

Nearly all the time of the first steps is compiling, which one thread does for each kernel. So they
use many processes, and Triton keeps on disk what any of them has compiled: see `expected_seconds`.
"""

import argparse
import contextlib
import os
import re
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
from adatape_kernels.recipes.check_jobs import jobs_of_cores

ROOT = Path(__file__).parents[1]
EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130
LAST_SECONDS = 20
"""So much of the time is kept for the table, and for steps that are slow to end."""

GRACE_SECONDS = 5
"""A step whose time is over is interrupted, and killed if it has not ended after so long."""

CHECK_COMPILATIONS = 340
"""Kernels that `check` compiles: a test counts those of its cases."""

CASES_OF_A_KIND = 3
"""So many cases run of each kind of test (tests/case_sample.py): all would take too long."""

TEST_COMPILATIONS, TEST_CASES = 760, 2250
"""Kernels that these cases compile, and how many there are.

Each run of the tests on a CPU counts both of those cases that it has (tests/count_compilations.py),
and fails if there are more.
"""

COMPILATION_SECONDS = 1.3
"""What one takes: the audit's 264 took 331 s on a core that it shared with others."""

BUILD_SECONDS = 46
"""What the build took beside an H200, on 16 cores."""

CASE_SECONDS = 505 / 2849
"""What a case takes besides: 2,849 took 505 s beside an H200, not counting what they compiled."""

START_SECONDS = 15
"""Until processes have imported torch and have a context on the GPU, or pytest has collected."""

SECONDS = "{seconds}"
"""In a command this stands for most of the time of its step, so that it ends by itself."""


class GpuStep(NamedTuple):
    """A command with its share of the time that is left when it starts."""

    name: str
    command: Sequence[str]
    share: float
    fault: str = r"(?!)"
    """What a line of its log matches that tells of a fault, in case the step is cut."""


class StepOutcome(NamedTuple):
    """How a step ended."""

    step: GpuStep
    code: int | None
    """The exit code is None if the step was cut."""
    seconds: float
    faults: int = 0
    """Lines of a step that was cut which tell of a fault."""

    @property
    def failed(self) -> bool:
        return self.faults > 0 if self.code is None else self.code != 0

    def line(self) -> str:
        """Return the outcome as a line of the last table."""
        state = f"exit {self.code}" if self.code else "ok"
        if self.code is None:
            state = f"cut, {self.faults} faults" if self.faults else "cut, no fault"
        return f"{self.step.name:24} {state:14} {self.seconds:5.0f} s"


# What the command `check` does, which would need packages that a machine with a GPU may lack.
_CHECK = """
import sys
from adatape_kernels.recipes.check import run
from adatape_kernels.recipes.check_jobs import jobs_for
from adatape_kernels.recipes.devices import chosen_device
device = str(chosen_device(sys.argv[1]))
sys.exit(not run(device, jobs_for(device)))
"""


def steps(device: str, out: Path, tests: str) -> list[GpuStep]:
    """Return the steps in their order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", *shlex.split(tests)]
    if find_spec("xdist") and "-n" not in pytest:
        pytest += ["-n", str(jobs_of_cores(os.cpu_count() or 2))]
    bench = [python, "-m", "adatape_kernels.cli", "bench", "--device", device, "--out", str(out)]
    budget = ["--budget", SECONDS]
    return [
        GpuStep("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 0.35, "error:"),
        GpuStep(
            "check",
            [python, "-c", _CHECK, device],
            0.3,
            " FAILED: ",
        ),
        GpuStep("tests", pytest, 0.6, r"(^| )(FAILED|ERROR) "),
        GpuStep("benchmarks", [*bench, "--compiled", "no", *budget], 0.65),
        GpuStep("compiled peers", [*bench, "--compiled", "only", *budget], 1.0),
    ]


def expected_seconds(cores: int) -> dict[str, float]:
    """Return what the steps before the benchmarks take by the number of their compilations."""

    check = CHECK_COMPILATIONS * COMPILATION_SECONDS
    tests = TEST_COMPILATIONS * COMPILATION_SECONDS + TEST_CASES * CASE_SECONDS
    return {
        "build": BUILD_SECONDS * 16 / cores,
        "check": START_SECONDS + check / jobs_of_cores(cores),
        "tests": START_SECONDS + tests / jobs_of_cores(cores),
    }


def run(step: GpuStep, log: Path, seconds: float) -> StepOutcome:
    """Run a step in a process group of its own, which is killed when its time is over."""
    seconds = max(1.0, seconds)
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
            preexec_fn=_heed_interrupts,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of the group have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines() if code is None else []
    faults = sum(re.search(step.fault, line) is not None for line in lines)
    outcome = StepOutcome(step, code, time.monotonic() - start, faults)
    if outcome.failed:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(outcome.line(), flush=True)
    return outcome


def _heed_interrupts() -> None:
    """Let an interrupt end a step also where a shell runs all of this in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    tests = f"-m cuda --cases-of-a-kind {CASES_OF_A_KIND}"
    parser.add_argument("--tests", default=tests, help=f"arguments of pytest; default: {tests}")
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
