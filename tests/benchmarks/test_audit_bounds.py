"""The bounds on kernels' code: the recorded audit keeps them, and code that does not is named."""

import dataclasses

import pytest

from adatape_kernels.ops import triton_runtime

if not triton_runtime.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from adatape_kernels.benchmarks.audit.audit_bounds import BOUNDS, Bound, faults_of
from adatape_kernels.benchmarks.audit.audit_cases import CASES, MODEL_CASES
from adatape_kernels.benchmarks.audit.triton_audit import ARCHS, AuditRow, recorded

ROWS = recorded().values()
ROW = AuditRow(
    *("_kernel", "64 a head, bf16", 90, 4, 3, 100, 0, 40_000, 8, 0, 0, 16, 4, 4),
    **dict(blocks=4, programs=1_056, waves=2.0, in_flight=2, wide=90, bf16=8, fp16=0, tf32=0),
    triton="3.7.1",
)
CASE = CASES[0]

needs_rows = pytest.mark.skipif(
    not ROWS, reason="audit.csv has other columns: `make audit ARGS=--record` writes it anew"
)


@needs_rows
def test_every_case_is_recorded_for_every_chip():
    assert {(row.case, row.arch) for row in ROWS} == {(c.name, a) for c in CASES for a in ARCHS}
    assert {case.name for case in MODEL_CASES} == {"S/16, B=256, bf16", "B/32, B=256, bf16"}


@needs_rows
def test_what_is_recorded_keeps_the_bounds():
    cases = {case.name: case for case in CASES}
    faults = [(row.key, fault) for row in ROWS for fault in row.faults(cases[row.case], None)]
    assert faults == []


@needs_rows
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound.kernel}-{bound.cases}")
def test_every_bound_concerns_a_recorded_row(bound):
    for arch in bound.archs:
        assert any(bound.concerns(row) for row in ROWS if row.arch == arch), arch


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (dict(blocks=5), "blocks a multiprocessor: 4, at least 5"),
        (dict(in_flight=3), "asynchronous copies in flight: 2, at least 3"),
        (dict(wide=91), "accesses of 16 bytes: 90 %, at least 91 %"),
        (dict(products=("bf16", "tf32")), "tensor cores: no product of tf32"),
        (dict(waves=1.0), "waves: 2.0, at most 1.0"),
        (dict(filled=3.0), "waves: 2.0, at least 3.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_passes_a_bound_is_named(bound, words):
    bounds = (Bound("_kernel", "^64 .*bf16$", (90,), **bound),)
    assert list(faults_of(ROW, bounds)) == [words]
    for other in (dict(kernel="_other"), dict(case="8 a head, bf16"), dict(arch=80)):
        assert list(faults_of(dataclasses.replace(ROW, **other), bounds)) == []


def test_a_kernel_that_fits_no_multiprocessor_is_named():
    row = dataclasses.replace(ROW, blocks=0)
    assert list(faults_of(row, ())) == ["no block of it fits a multiprocessor"]


@pytest.mark.parametrize(
    ("column", "less", "words"),
    [
        ("blocks", 3, "blocks a multiprocessor: 3, recorded 4"),
        ("in_flight", 0, "asynchronous copies in flight: 0, recorded 2"),
        ("wide", 40, "percent of accesses of 16 bytes: 40, recorded 90"),
    ],
)
def test_less_than_was_recorded_is_a_fault(column, less, words):
    assert list(dataclasses.replace(ROW, **{column: less}).faults(CASE, ROW)) == [words]
    assert list(ROW.faults(CASE, dataclasses.replace(ROW, **{column: less}))) == []
