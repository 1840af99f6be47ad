"""All that a machine with a GPU is asked: build, test, measure, within minutes: make gpu.

    python benchmarks/gpu.py --out results-of-this-machine --minutes 7.5

Needs a CUDA build of torch, nvcc, numpy and pytest; builds in place, installs nothing. Each step
has its share of the time and is stopped at its end. What was measured until then stays: the rows
of a case are written when it ends. Exits with 1 if a step failed, after the table.
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

ROOT = Path(__file__).parents[1]
EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130
LAST_SECONDS = 10
"""Kept for the table."""

SECONDS = "{seconds}"
"""In a command: most of the time that its step has, so that it ends by itself."""


class Step(NamedTuple):
    """A command with its share of the time that is left when it starts."""

    name: str
    command: Sequence[str]
    share: float
    may_be_cut: bool
    """Whether what it did until it was stopped is worth as much."""


class Outcome(NamedTuple):
    step: Step
    code: int | None
    """None when it was stopped."""
    seconds: float

    @property
    def failed(self) -> bool:
        return not self.step.may_be_cut if self.code is None else self.code != 0

    def line(self) -> str:
        state = "out of time" if self.code is None else f"exit {self.code}" if self.code else "ok"
        return f"{self.step.name:24} {state:12} {self.seconds:5.0f} s"


def steps(device: str, out: Path, tests: str) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    if find_spec("xdist") and "-n" not in pytest:
        pytest += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    bench = [python, "-m", "adatape_kernels.cli", "bench", "--device", device, "--out", str(out)]
    budget = ["--budget", SECONDS]
    return [
        Step("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 0.35, False),
        Step(
            "check", [python, "-m", "adatape_kernels.cli", "check", "--device", device], 0.2, False
        ),
        Step("tests", pytest, 0.5, False),
        Step("benchmarks", [*bench, "--compiled", "no", *budget], 0.65, True),
        Step("compiled peers", [*bench, "--compiled", "only", *budget], 1.0, True),
    ]


def run(step: Step, log: Path, seconds: float) -> Outcome:
    """Run a step in a process group of its own, which is ended when the time is over."""
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
    outcome = Outcome(step, code, time.monotonic() - start)
    if outcome.failed:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(outcome.line(), flush=True)
    return outcome


def table(device: str, out: Path) -> str:
    """Return the Markdown table of the rows that are there."""
    sys.path.insert(0, str(ROOT))
    import records
    import report

    path = records.destination(out, device)
    return report.summary(report.entries(records.read(path))) + f"\nrows: {path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and print the table, whatever happens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=7.5, help="of everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tests", default="-m cuda", help="arguments of pytest; default: -m cuda")
    parser.add_argument("--only", nargs="*", metavar="STEP", help="run these steps only")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes - LAST_SECONDS
    out = arguments.out.resolve()
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
    except Exception as error:  # e.g. torch cannot be imported; the steps said so
        print(f"no table: {type(error).__name__}: {error}")
    print("\n".join(outcome.line() for outcome in outcomes))
    return EXIT_FAILED if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
