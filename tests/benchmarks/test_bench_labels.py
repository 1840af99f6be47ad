"""A benchmark row's label is what ran, by the dispatcher's record; one that lies is an error."""

import dataclasses
from pathlib import Path

import pytest
import torch

import adatape_kernels
from adatape_kernels import ops, use_backend
from adatape_kernels.benchmarks.harness import cases, command, labels, records, suites
from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Effort,
    Prepared,
    Provider,
    with_backend,
)
from adatape_kernels.ops.op import Ran, operation

README = Path(adatape_kernels.__file__).parents[1] / "benchmarks" / "README.md"
EFFORT = Effort(rounds=3, seconds=0.1, quick=True)
FORWARD, BACKWARD = Ran("tape_select", "cpp"), Ran("tape_select_bwd", "cpp")
BOTH = ("tape_select", "tape_select_bwd")


@pytest.mark.parametrize(
    ("ran", "label", "words"),
    [
        ([FORWARD, BACKWARD], "cpp", None),
        ([FORWARD, BACKWARD, FORWARD], ANY_BACKEND, None),
        ([], None, None),
        ([FORWARD, BACKWARD], "triton", "every op to run on triton, got tape_select on cpp, "),
        ([FORWARD, Ran("tape_select_bwd", "eager")], "cpp", "tape_select_bwd on eager"),
        ([FORWARD], "cpp", "tape_select_bwd to run, got tape_select on cpp"),
        ([], ANY_BACKEND, "tape_select and tape_select_bwd to run, got no op of ours"),
        ([FORWARD], None, "a peer that calls no op of ours, got tape_select on cpp"),
    ],
)
def test_a_label_is_compared_with_what_ran(ran, label, words):
    found = labels.difference(ran, label, BOTH)
    assert found is None if words is None else words in found


def test_who_served_is_told_by_op_where_several_backends_did():
    assert labels.served_by([FORWARD, BACKWARD]) == "served by cpp"
    mixed = [BACKWARD, Ran("tape_select", "eager"), FORWARD]
    text = "served by cpp (tape_select, tape_select_bwd) and eager (tape_select)"
    assert labels.served_by(mixed) == text


def norm_case(*providers):
    """The fused sum and LayerNorm on a few rows."""

    def reference(x):
        total = 2 * x.double()
        return [torch.nn.functional.layer_norm(total, (4,), eps=1e-6)]

    return BenchmarkCase(
        op="add_layer_norm",
        direction="forward",
        dtype=torch.float32,
        shape="n=3",
        device_type="cpu",
        inputs=lambda: torch.randn(3, 4),
        reference=reference,
        providers=providers,
        flops=0,
        bytes=48,
        measured_ops=["add_layer_norm"],
    )


def norm(x):
    return ops.add_layer_norm(x, x, torch.ones(4), torch.zeros(4), eps=1e-6)[1]


def prepare(x):
    return Prepared(lambda: norm(x), lambda y: [y])


def prepare_on_eager(x):
    def run():
        with use_backend("eager"):
            return norm(x)

    return Prepared(run, lambda y: [y])


def test_a_label_that_lies_is_an_error_and_never_timed(tmp_path, monkeypatch, capsys):
    liar = with_backend(Provider(f"{OURS} triton", prepare_on_eager), "eager")
    liar = dataclasses.replace(liar, backend="triton")
    secret = Provider("peer", prepare)
    honest = Provider(OURS, prepare, ANY_BACKEND)
    rows = cases.run(norm_case(honest, liar, secret), EFFORT)
    assert [row.status for row in rows] == ["ok", "failed", "failed"]
    assert rows[0].note.startswith("served by ") and rows[0].median_s > 0
    assert rows[1].note.startswith("label: expected every op to run on triton, got ")
    assert rows[2].note.startswith("label: expected a peer that calls no op of ours, got ")
    assert rows[1].median_s is rows[2].median_s is None
    assert list(map(command.is_fault, rows)) == [False, True, True]


def test_a_backend_that_does_not_serve_the_shape_is_skipped_with_its_reason(monkeypatch):
    op = operation("add_layer_norm")
    eager = op.implementations["eager"]
    monkeypatch.setitem(
        op.implementations,
        "eager",
        dataclasses.replace(eager, limits=lambda facts, *args: "it takes no rows of 4"),
    )
    op._candidates.clear()
    try:
        (row,) = cases.run(norm_case(with_backend(Provider("eager", prepare), "eager")), EFFORT)
    finally:
        op._candidates.clear()
    assert row.status == "skipped" and "it takes no rows of 4" in row.note


@pytest.mark.parametrize("op", ["tape_select", "tape_gather", "elastic_attention", "dual_ffn"])
def test_every_backend_with_a_kernel_here_has_a_provider(op):
    implementations = operation(op).implementations
    here = {
        backend
        for backend, given in implementations.items()
        if given.refusal_by_type("cpu", torch.float32) is None
    }
    found = cases.ours(op, prepare, "cpu", torch.float32)
    assert found[0].name == OURS and found[0].backend == ANY_BACKEND
    forced = {provider.backend for provider in found[1:]}
    default = "cpp" if "cpp" in here else "eager"
    assert forced == here - {"eager", default}
    assert all(provider.name == f"{OURS} {provider.backend}" for provider in found[1:])


@pytest.mark.parametrize(("head_dim", "status"), [(64, "ok"), (8, "skipped")])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_attention_in_cuda_c_plus_plus_runs_or_says_why_not(head_dim, status, direction):
    kernel = operation("elastic_attention").implementations["cuda"]
    reason = kernel.refusal_by_type("cpu", torch.float16)
    if reason is not None:
        pytest.skip(f"the CUDA kernels are not built for the host: {reason}")
    suite = command.suites(["elastic_attention"])["elastic_attention"]
    shape = suite.parse(f"B=3 N=5-9 T=3 H=2 d={head_dim}")
    only = EFFORT._replace(providers=frozenset([f"{OURS} cuda"]))
    (row,) = cases.run(suite.case(shape, direction, torch.float16, "cpu"), only)
    assert row.status == status, row.note
    assert status == "ok" or f"not {head_dim}" in row.note


def test_every_letter_of_a_shape_is_in_the_legend_of_help_and_readme():
    letters = {letter for suite in command.suites([]).values() for letter in suite.shape._fields}
    assert letters == set(suites.LEGEND)
    text, readme = command.parser().format_help(), README.read_text(encoding="utf-8")
    for letter, meaning in suites.LEGEND.items():
        assert f"  {letter}: {meaning}\n" in text
        assert f"| `{letter}` | {meaning} |\n" in readme


def test_rows_that_were_recorded_before_can_be_read_and_shown():
    row = records.row(
        records.CaseKey("add_layer_norm", "forward", "float32", "n=3"),
        OURS,
        "cpu",
        status="failed",
        note="label: expected every op to run on cpp, got add_layer_norm on eager",
    )
    (_, line) = command.lines([row])
    assert "failed: label: expected" in line
