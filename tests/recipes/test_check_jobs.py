"""`check` shared among processes, and without TensorFloat-32."""

import os

import pytest
import torch

from adatape_kernels.cli import main
from adatape_kernels.ops.op import why_absent
from adatape_kernels.recipes import check, check_jobs
from adatape_kernels.recipes.check import Finding, Outcome
from adatape_kernels.recipes.full_precision import without_tf32


def with_tf32():
    """Whether products and convolutions would use TensorFloat-32 now."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return [place.fp32_precision == "tf32" for place in places]


@pytest.fixture
def settings():
    """The settings of a new process, which a test may change by either of torch's two names."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    yield torch.backends
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def older_names(backends):
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True


def newer_names(backends):
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize("change", [lambda backends: None, older_names, newer_names])
def test_tf32_is_off_inside_and_as_before_behind(settings, change):
    change(settings)
    before = with_tf32()
    assert any(before)
    with pytest.raises(KeyError), without_tf32():
        assert not any(with_tf32())
        raise KeyError
    assert with_tf32() == before


@pytest.mark.parametrize("subject", ["elastic_as_padded", "_accuracy"])
def test_check_has_no_tf32_in_models_and_ops(subject, monkeypatch):
    """cuDNN has it on by default, in the convolution that makes patches."""
    assert with_tf32() == [False, True]
    seen = []

    def note(*arguments):
        seen.extend(with_tf32())

    monkeypatch.setattr(check, subject, note)
    monkeypatch.setattr(check, "KERNEL_BACKENDS", ("eager",))
    with check.prepared("cpu"):
        for unit in check.units("cpu"):
            if unit.args[2] is note or unit.args[1] is note:
                check.outcome_of(unit)
    assert seen and not any(seen)


def test_every_check_draws_the_same_in_any_order(monkeypatch):
    if reason := why_absent("cpp"):
        pytest.skip(f"no compiled part: {reason}")
    monkeypatch.setattr(check, "KERNEL_BACKENDS", ("cpp",))
    given = []
    monkeypatch.setattr(check, "_accuracy", lambda case, *of: given.append(case.inputs()))
    with check.prepared("cpu"):
        every = check.units("cpu")
        for unit in (every[0], every[3], every[0]):
            check.outcome_of(unit)
    first, _, again = given
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def echo(unit):
    """What a unit of the work does in these tests; each process knows its own number only."""
    if unit == 2 and os.environ.get("ADATAPE_TEST_DIES"):
        os._exit(9)
    return Outcome(Finding(f"unit {unit}", None), frozenset())


def ready(device):
    assert device == "cpu"


@pytest.mark.parametrize("dies", [False, True])
def test_processes_yield_in_order_and_one_that_dies_is_named(monkeypatch, dies):
    monkeypatch.setattr(check_jobs, "START_METHOD", "fork")
    if dies:
        monkeypatch.setenv("ADATAPE_TEST_DIES", "1")
    outcomes = list(check_jobs.in_processes(ready, echo, "cpu", 5, 3))
    names = [None if outcome is None else outcome.finding.name for outcome in outcomes]
    assert names == [f"unit {unit}" if not (dies and unit == 2) else None for unit in range(5)]


def test_a_death_is_a_failure_in_the_verdict(monkeypatch, capsys):
    right = Outcome(Finding("right", None), frozenset())
    monkeypatch.setattr(check, "in_processes", lambda *of: iter([right, None]))
    monkeypatch.setattr(check, "units", lambda device: [None, None])
    monkeypatch.setattr(check, "_kernels", lambda device: iter(()))
    assert main(["check", "--device", "cpu", "--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(" FAILED")[0].rstrip() == "check 2 of 2"
    assert "1 of 2 checks failed" in lines[-1]


def test_the_number_of_processes():
    assert check_jobs.jobs_for("cpu") == 1
    assert 1 <= check_jobs.jobs_for("cuda") <= check_jobs.MOST_JOBS
    with pytest.raises(ValueError, match="jobs: expected"):
        check.run("cpu", 0)


def test_a_process_lists_the_units_of_its_parent(monkeypatch):
    if reason := why_absent("cpp"):
        pytest.skip(f"no compiled part: {reason}")
    monkeypatch.setattr(check, "KERNEL_BACKENDS", ("cpp",))
    with check.prepared("cpu"):
        first, second = check.units("cpu"), check.units("cpu")
    names = [
        [f"{unit.func.__name__} {unit.args[:2]}" for unit in units] for units in (first, second)
    ]
    assert names[0] == names[1] and len(first) > 60
