"""`make gpu`: each step may be cut, a fault before the cut counts, and all fits in 8 minutes."""

import signal
import sys
import time

import pytest

from adatape_kernels.benchmarks import gpu
from adatape_kernels.benchmarks.gpu import GpuStep, StepOutcome


def running(tmp_path, script, fault="FAILED", seconds=1.0):
    step = GpuStep("step", [sys.executable, "-c", script], 1.0, fault)
    return gpu.run(step, tmp_path / "step.log", seconds)


SLEEP = "import time; time.sleep(60)"


def test_a_step_that_is_cut_has_not_failed(tmp_path, capsys):
    start = time.monotonic()
    outcome = running(tmp_path, f"print('one ok', flush=True); {SLEEP}")
    assert time.monotonic() - start < 1 + gpu.GRACE_SECONDS
    assert (outcome.code, outcome.faults, outcome.failed) == (None, 0, False)
    assert "cut, no fault" in capsys.readouterr().out


def test_a_step_heeds_the_interrupt_where_the_run_ignores_it(tmp_path):
    """As in the background of a shell, which lets no interrupt through."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        heeds = f"try: {SLEEP}\nexcept KeyboardInterrupt: print('FAILED')"
        assert running(tmp_path, heeds).faults == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fault_before_the_cut_is_a_failure(tmp_path, capsys):
    told = "print('a FAILED: b', flush=True); print('c FAILED: d', flush=True)"
    outcome = running(tmp_path, f"{told}; {SLEEP}")
    assert (outcome.code, outcome.faults, outcome.failed) == (None, 2, True)
    out = capsys.readouterr().out
    assert "cut, 2 faults" in out and "a FAILED: b" in out


def test_a_step_that_does_not_heed_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    start = time.monotonic()
    assert running(tmp_path, f"{deaf}; {SLEEP}").code is None
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("code", "failed"), [(0, False), (3, True)])
def test_a_step_that_ends_tells_by_its_code(tmp_path, code, failed):
    outcome = running(tmp_path, f"print('FAILED'); raise SystemExit({code})", seconds=60)
    assert (outcome.code, outcome.faults, outcome.failed) == (code, 0, failed)


def test_every_step_may_be_cut(tmp_path):
    for step in gpu.steps("cuda", tmp_path, "-m cuda"):
        assert not StepOutcome(step, None, 1.0).failed


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("build", "x.cu(3): error: no such thing"),
        ("check", "tape_gather, a case, cuda float32     FAILED: error 1e-1"),
        ("tests", "[gw3] [ 12%] FAILED tests/ops/test_op.py::test_it[cuda]"),
        ("tests", "ERROR tests/ops/test_op.py - ImportError"),
    ],
)
def test_a_line_that_tells_of_a_fault_is_seen(tmp_path, name, line):
    import re

    (step,) = (step for step in gpu.steps("cuda", tmp_path, "-m cuda") if step.name == name)
    assert re.search(step.fault, line)
    assert not re.search(step.fault, "[gw3] [ 12%] PASSED tests/ops/test_op.py::test_FAILED[x]")
    assert not re.search(step.fault, "tape_gather, a case, cuda float32     ok")


def test_the_steps_together_keep_to_the_time():
    """Whatever each step does with its share, and though each is slow to end when it is cut."""
    end, now = 60 * 7.5 - gpu.LAST_SECONDS, 0.0
    for step in gpu.steps("cuda", gpu.ROOT, "-m cuda"):
        now += max(1.0, step.share * (end - now))
        now += gpu.GRACE_SECONDS if step.share < 1 else 0
    assert now + gpu.GRACE_SECONDS + 10 <= 8 * 60


def test_by_their_compilations_the_steps_leave_time_to_measure():
    """On the 16 cores beside an H200 the steps end before they are cut, and 3 minutes are left."""
    expected = gpu.expected_seconds(16)
    left = 60 * 7.5 - gpu.LAST_SECONDS
    for step in gpu.steps("cuda", gpu.ROOT, "-m cuda"):
        if step.name in expected:
            assert expected[step.name] <= step.share * left, step.name
            left -= expected[step.name]
    assert left >= 180
