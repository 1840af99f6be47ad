"""Providers that end the process in which they are measured cost their own rows, and no others."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import forked_python
import pytest

from adatape_kernels.benchmarks.harness.own_process import CasesDone

SECONDS = 120
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere processes are not forked safely"
)

# The command with providers that are planted beside those of compact_rows; WHEN is replaced.
PROGRAM = """
import os, signal, sys, torch
torch.set_num_threads(1)
from adatape_kernels.benchmarks.harness import cases, ceilings, timing
from adatape_kernels.benchmarks.ops import bench_compact_rows
from adatape_kernels.cli import main
timing.cache_bytes = lambda device_type: 1
timing.SAMPLE_SECONDS = {"cpu": 1e-5}
ceilings.COPIED, ceilings.SIDES = {"cpu": 4096}, {"cpu": (16, 16)}
suite, plain = bench_compact_rows.SUITE, cases.Provider
def die(number):
    print("ended in", os.getpid(), file=sys.stderr, flush=True)
    os._exit(-number) if number < 0 else os.kill(os.getpid(), number)
def planted(name, number, at, of):
    def prepare(given):
        each, calls = of.prepare(given), []
        def run():
            calls.append(1)
            if len(calls) == at:
                die(number)
            return each.run()
        return each._replace(run=run)
    return plain(name, prepare, checked=False)
def case(shape, direction, dtype, device_type):
    made = suite_case(shape, direction, dtype, device_type)
    if shape.N in LEFT:
        return made
    before, after = made.providers[:2], made.providers[2:]
    own = planted("dies at once", signal.SIGSEGV, 1, made.providers[-1])
    late = planted("dies when timed", signal.SIGABRT, 2, made.providers[-1])
    leaves = planted("leaves", -3, 1, made.providers[-1])
    found = [*before, own, late, leaves, *after]
    return dataclasses.replace(made, providers=found, inputs=INPUTS(made.inputs))
import dataclasses
LEFT, INPUTS = [7], lambda inputs: inputs
suite_case = suite.case
object.__setattr__(suite, "case", case)
REPLACED
sys.argv[1:] = ["bench", "compact_rows", "--quick", "--device", "cpu", "--direction", "forward"]
sys.argv += ["--dtype", "float32", "--out", "rows.csv", "--shape", "B=3 N=5 D=16 kept=50"]
sys.argv += ["--shape", "B=3 N=7 D=16 kept=50"]
sys.exit(main())
"""


def bench(folder, replaced=""):
    """Run it; return what it said, and its rows by shape."""
    found = forked_python.run(
        ["-c", PROGRAM.replace("REPLACED", replaced)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    rows = {}
    with (folder / "rows.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["shape"], {})[row["provider"]] = row
    return found, rows


def test_what_ends_the_process_costs_its_own_rows_alone(tmp_path):
    found, rows = bench(tmp_path)
    assert found.returncode == 0, found.stderr
    first, second = (rows[f"B=3 N={n} D=16 kept=50"] for n in (5, 7))
    ended = {
        "dies at once": "the process was ended while it ran: SIGSEGV (Segmentation fault)",
        "dies when timed": "the process was ended while it ran: SIGABRT (Aborted)",
        "leaves": "the process was ended while it ran: exit code 3",
    }
    assert {name: row["note"] for name, row in first.items() if row["status"] == "failed"} == ended
    assert set(first) - set(ended) == set(second) and len(second) > 2
    for row in (*second.values(), *(first[name] for name in second)):
        assert row["status"] in ("ok", "skipped") and bool(row["median_s"]) == (
            row["status"] == "ok"
        )
    assert [row["status"] for row in (first["ours"], second["ours"])] == ["ok", "ok"]
    # The table of the terminal says the same; each death is a line of its own.
    for name, words in ended.items():
        assert f"{name:38} failed: {words}" in found.stdout
    said = [line for line in found.stderr.splitlines() if line.startswith("bench: ")]
    assert said == [
        f"bench: the process was ended while {name} ran: {words.partition('ran: ')[2]}; the other "
        "rows are measured in a new one"
        for name, words in sorted(ended.items(), key=lambda item: found.stderr.index(item[0]))
    ]
    # What is measured is not in the process that waits.
    lines = [line for line in found.stderr.splitlines() if line.startswith("ended in ")]
    assert len(set(lines)) == len(ended)


def test_a_case_that_ends_the_process_by_itself_has_one_row_that_failed(tmp_path):
    found, rows = bench(tmp_path, "INPUTS = lambda inputs: lambda: die(signal.SIGILL)")
    assert found.returncode == 1, found.stderr
    (row,) = rows["B=3 N=5 D=16 kept=50"].values()
    assert (row["provider"], row["status"]) == ("ours", "failed")
    assert row["note"] == "the process was ended while it ran: SIGILL (Illegal instruction)"
    assert rows["B=3 N=7 D=16 kept=50"]["ours"]["status"] == "ok"
    assert "while no provider ran: SIGILL" in found.stderr


def test_a_death_that_no_provider_can_be_left_out_for_ends_the_command(tmp_path):
    found, rows = bench(tmp_path, "ceilings.measured = lambda *_: die(9)")
    assert found.returncode == 1 and not rows
    assert found.stderr.splitlines()[1:] == [
        "bench: the process was ended between two cases: SIGKILL (Killed)"
    ]


@pytest.fixture
def waiting(tmp_path):
    """The command, whose measuring process sleeps; that process's number; what both have said."""
    sleeps = "import time; ceilings.measured = lambda *_: (die(0), time.sleep(60))"
    words = tmp_path / "words"
    with words.open("wb") as stream:
        program = ["-c", PROGRAM.replace("REPLACED", sleeps)]
        process = forked_python.Popen(program, cwd=tmp_path, stdout=stream, stderr=stream)
    until = time.monotonic() + SECONDS
    while not words.read_text().endswith("\n"):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    yield process, int(words.read_text().split()[-1]), words
    process.kill()


@pytest.mark.parametrize("to", ["waits", "measures"])
def test_who_is_asked_to_end_ends_in_one_line(to, waiting):
    process, measuring, words = waiting
    assert measuring != process.pid
    os.kill(process.pid if to == "waits" else measuring, signal.SIGTERM)
    assert process.wait(SECONDS) == 130
    assert words.read_text().splitlines()[1:] == [
        "bench: interrupted; the rows of every finished case are kept"
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(measuring, 0)


def test_what_measures_ends_with_the_process_that_waits(waiting):
    process, measuring, _ = waiting
    process.kill()
    until = time.monotonic() + SECONDS
    while Path(f"/proc/{measuring}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_progress_is_read_from_what_another_process_wrote():
    progress = CasesDone()
    progress.ended[1, "a"] = "words"
    assert (progress.done, progress.running, progress.finished) == (0, None, False)
    process = os.fork()
    if not process:
        progress.runs("b")
        progress.case_done(True)
        progress.runs("é" * 200)
        os._exit(0)
    os.waitpid(process, 0)
    assert (progress.done, progress.faults, progress.finished) == (1, 1, False)
    assert progress.running == "é" * 128
    assert progress.ended_in(1) == {"a": "words"} and progress.ended_in(0) == {}
    progress.runs("")
    assert progress.running == ""
