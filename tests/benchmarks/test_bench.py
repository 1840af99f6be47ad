import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adatape_kernels
from adatape_kernels.benchmarks import bench_cpu
from adatape_kernels.benchmarks.harness import cases, ceilings, command, records, timing
from adatape_kernels.benchmarks.harness.cases import (
    OURS,
    BenchmarkCase,
    Effort,
    Prepared,
    Provider,
    Skipped,
)

ROOT = Path(adatape_kernels.__file__).parents[1]
TINY = {
    "tape_select": "B=3 M=40 K=8 k=2 T=3 tau=1",
    "tape_gather": "B=3 M=40 D=16 k=2 T=3 tape=uniform",
    "tape_read": "B=3 M=40 bank=learn D=16 K=8 k=2 T=3 tau=1",
    "elastic_attention": "B=3 N=5-9 T=3 H=2 d=8",
    "compact_rows": "B=3 N=5 D=16 kept=50",
    "accumulate_rows": "B=3 N=5 D=16 kept=50",
    "halting": "model=avit V=Ti/56 B=2 halted=50",
    "dual_ffn": "B=3 N=5 T=3 D=16 F=32 G=16",
    "model": "V=Ti/112 B=2 T=3 k=2 bank=learn M=40 tape=skewed",
    "image_sizes": "V=Ti/16 B=3 N=2-7 T=3 k=2",
    "dispatch": "op=dual_ffn",
}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device_type: 1)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", {"cpu": 1e-5})
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(ceilings, "SIDES", {"cpu": (16, 16)})
    ceilings.measured.cache_clear()
    yield
    ceilings.measured.cache_clear()


@pytest.fixture
def few_samples(monkeypatch):
    """Two samples of each provider; a test of the clocks counts those that it asks for."""
    interleaved = timing.interleaved

    def twice(runs, device_type, *, rounds, seconds, **options):
        assert rounds == 5 and seconds > 0
        return interleaved(runs, device_type, rounds=2, seconds=seconds, **options)

    monkeypatch.setattr(timing, "interleaved", twice)


@pytest.mark.parametrize("op", command.OPS)
def test_every_op_is_checked_and_timed_beside_its_peers(op, few_samples, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = [op, "--quick", "--device", "cpu", "--shape", TINY[op], "--out", str(path)]
    assert command.main(arguments) == 0, capsys.readouterr().err
    rows = records.read(path)
    ceiling, measured = (
        [r for r in rows if (r.op == "ceiling") == is_it] for is_it in (True, False)
    )
    assert {r.direction for r in ceiling} == {"copy", "product"}
    suite = command.suites([op])[op]
    assert {r.direction for r in measured} == set(suite.directions)
    assert {r.provider for r in measured} <= set(suite.providers)
    for row in measured:
        assert row.status == "ok" or (row.status == "skipped" and row.note), row
        assert suite.parse(row.shape) == suite.parse(TINY[op])
        if row.status == "ok":
            assert row.p20_s <= row.median_s <= row.p80_s
            if row.flops:
                assert row.gflop_per_s == pytest.approx(row.flops / row.median_s / 1e9, rel=1e-4)
                assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9, rel=1e-4)
                assert row.percent_of_limit > 0
    assert any(row.provider == OURS and row.status == "ok" for row in measured)


@pytest.mark.parametrize("pattern", ["zero", "full", "uniform", "skewed", "2"])
def test_tape_patterns_that_a_model_is_made_to_read(pattern, tmp_path):
    shape = f"V=Ti/112 B=10 T=4 k=2 bank=learn M=40 tape={pattern}"
    suite = command.suites(["model"])["model"]
    given = suite.case(suite.parse(shape), "forward", torch.float32, "cpu").inputs()
    lens = sorted(given.model(given.images).tape_lens.tolist())
    expected = {"zero": [0] * 10, "full": [4] * 10, "skewed": [0] * 9 + [4], "2": [2] * 10}
    assert lens == expected.get(pattern, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


def case(*providers):
    return BenchmarkCase(
        op="square",
        direction="forward",
        dtype=torch.float32,
        shape="n=4",
        device_type="cpu",
        inputs=lambda: torch.randn(4),
        reference=lambda x: [x.double().square()],
        providers=providers,
        flops=4,
        bytes=32,
    )


def provider(name, function, **options):
    return Provider(name, lambda x: Prepared(lambda: function(x), lambda y: [y]), **options)


EFFORT = Effort(rounds=3, seconds=0.1, quick=True)


def test_a_wrong_provider_is_reported_and_not_timed():
    calls = []

    def wrong(x):
        calls.append(1)
        return x.square() + 0.1

    ours, theirs = cases.run(case(provider(OURS, torch.square), provider("peer", wrong)), EFFORT)
    assert ours.status == "ok" and ours.median_s > 0
    assert (theirs.status, theirs.median_s, theirs.percent_of_limit) == ("wrong", None, None)
    assert "off by 0.1" in theirs.note and len(calls) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_wrong(value):
    (row,) = cases.run(case(provider(OURS, lambda x: x.square() + value)), EFFORT)
    assert row.status == "wrong"


def test_other_shapes_are_wrong_though_they_broadcast():
    (row,) = cases.run(case(provider(OURS, lambda x: x.square()[None])), EFFORT)
    assert row.status == "wrong" and "shape" in row.note


def test_an_anchor_is_not_compared():
    (row,) = cases.run(case(provider("anchor", torch.sin, checked=False)), EFFORT)
    assert row.status == "ok"


def test_a_peer_that_is_not_to_be_had_is_skipped_with_its_reason():
    def absent(x):
        raise Skipped("no such library")

    def broken(x):
        raise RuntimeError("two\nlines")

    rows = cases.run(
        case(provider(OURS, torch.square), Provider("a", absent), Provider("b", broken)), EFFORT
    )
    assert [r.status for r in rows] == ["ok", "skipped", "failed"]
    assert [r.note for r in rows[1:]] == ["no such library", "RuntimeError: two"]


@pytest.mark.parametrize("capturable", [True, False])
def test_on_a_gpu_a_provider_is_also_a_graph(capturable, monkeypatch):
    def captured(run):
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    monkeypatch.setattr(timing, "captured", captured)
    here = dataclasses.replace(case(), device_type="cuda")
    sets, expected = [torch.arange(4.0)], [torch.arange(4.0).square()]
    found = [
        (attempt.name, attempt.status, len(attempt.runs))
        for each in (provider("a", torch.square), provider("b", torch.square, graph=False))
        for attempt in cases.attempts_of(here, each, sets, expected)
    ]
    graph = ("a [graph]", "ok", 1) if capturable else ("a [graph]", "failed", 0)
    assert found == [("a", "ok", 1), graph, ("b", "ok", 1)]


def test_only_what_is_wanted_runs():
    every = (
        provider(OURS, torch.square),
        provider("peer", torch.square),
        provider("compiled", torch.square, compiled=True),
    )

    def names(**options):
        return [r.provider for r in cases.run(case(*every), EFFORT._replace(**options))]

    assert names() == [OURS, "peer", "compiled"]
    assert names(compiled="no") == [OURS, "peer"]
    assert names(compiled="only") == [OURS, "compiled"]
    assert names(providers=frozenset(["peer"])) == ["peer"]


def test_providers_take_turns_and_inputs_rotate():
    calls = []

    def run(name):
        return lambda: calls.append(name)

    runs = {"a": [run("a0"), run("a1")], "b": [run("b0"), run("b1")]}
    found = timing.interleaved(runs, "cpu", rounds=4, seconds=0)
    assert set(found) == {"a", "b"}
    assert calls.count("a0") - calls.count("a1") in (-1, 0, 1)
    # After warming up each provider is sampled in turn.
    turns = [name[0] for i, name in enumerate(calls) if i == 0 or calls[i - 1][0] != name[0]]
    assert turns == ["a", "b"] * (1 + timing.LEAST_ROUNDS)


def arguments(tmp_path, *more):
    return [*more, "--quick", "--device", "cpu", "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["tape_eject"], "op: expected one of tape_select, "),
        (["--provider", "nobody"], "provider: expected one of "),
        (["--direction", "sideways"], "direction: expected one of "),
        (["--dtype", "int8"], "dtype: expected one of "),
        (["--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (["--threads", "0"], "threads: expected 1 or more, got 0"),
        (["--shape", "B=1"], "shape: expected one op to go with it, got 11"),
        (["tape_select", "--shape", "B=0"], "shape: expected a whole number from 1 on for B"),
        (["tape_select", "--shape", "Z=1"], "shape: expected B=… M=… "),
        (["tape_select", "--shape", "M=3 k=5"], "shape: expected M from k = 5 on, got 3"),
        (["tape_select", "--shape", "tau=0"], "shape: expected a number above 0 for tau"),
        (["tape_gather", "--shape", "tape=some"], "shape: expected zero, full, uniform, skewed or"),
        (["elastic_attention", "--shape", "N=9-3"], "shape: expected a number or two"),
        (["model", "--shape", "V=S/15"], "shape: expected Ti, S, B or L, a slash and a patch"),
        (["model", "--shape", "V=S/112 T=40 tape=full"], "shape: expected a bank of at least"),
        (["dispatch", "--shape", "op=x"], "shape: expected one of tape_select"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_timed(
    given, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it was measured"))
    assert command.main([*arguments(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench: {words}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "\x00", "op,direction\n"])
def test_a_file_of_another_format_stays_as_it_is(content, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it was measured"))
    path = tmp_path / "other.csv"
    path.write_text(content)
    assert command.main(["dispatch", "--device", "cpu", "--out", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: expected the columns op,direction" in error and error.count("\n") == 1
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        command.main(["dispatch", "--device", "cpu", "--out", str(tmp_path / "file/folder")]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("bench: out: expected a place to write") and error.count("\n") == 1


def test_an_interrupted_run_keeps_its_rows(tmp_path, capsys, monkeypatch):
    finished = []

    def run(case, effort):
        if finished:
            raise KeyboardInterrupt
        finished.append(cases.run(case, effort))
        return finished[0]

    monkeypatch.setattr(command, "run", run)
    assert command.main(arguments(tmp_path, "dispatch")) == 130
    assert "are kept" in capsys.readouterr().err
    (path,) = (tmp_path / "out").iterdir()
    rows = records.read(path)
    assert [r.op for r in rows if r.provider in ("torch", OURS)] == ["ceiling"] * 2 + ["dispatch"]


def test_a_case_that_cannot_be_had_is_a_row_and_the_next_one_runs(tmp_path, capsys, monkeypatch):
    tried = []

    def run(case, effort):
        tried.append(case)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("too large\nby far")
        return cases.run(case, effort)

    monkeypatch.setattr(command, "run", run)
    assert command.main(arguments(tmp_path, "dispatch")) == 1
    (path,) = (tmp_path / "out").iterdir()
    failed, *others = [r for r in records.read(path) if r.op == "dispatch"]
    assert (failed.status, failed.note) == ("failed", "OutOfMemoryError: too large")
    assert failed.shape == "op=tape_select"
    assert [r.status for r in others if r.provider == OURS] == ["ok"] * 8


def test_no_case_begins_after_the_budget(tmp_path, capsys):
    assert command.main(arguments(tmp_path, "dispatch", "--budget", "0")) == 0
    assert "9 cases left out" in capsys.readouterr().out


def test_a_run_that_is_cut_short_has_rows_of_every_op():
    arguments = command.parser().parse_args([])
    every = [list(command.planned_cases(s, arguments, "cpu")) for s in command.suites([]).values()]
    first = [each.suite.op for each in command.in_turn(every)[: len(command.OPS)]]
    assert first == list(command.OPS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_selected_shape_can_be_parsed(device):
    for suite in command.suites([]).values():
        selection = suite.shapes(device)
        assert set(selection.quick) <= {*selection.default, *selection.scaling}
        for text in {*selection.default, *selection.scaling, *selection.sweep}:
            suite.parse(text)


def test_goals_name_cases_and_peers_that_there_are():
    found = list(bench_cpu.goals(whole_models=True))
    assert len({(goal.suite.op, goal.shape, goal.direction) for goal in found}) > 10
    for goal in found:
        goal.suite.parse(goal.shape)
        assert goal.direction in goal.suite.directions
        assert set(goal.ratios) <= set(goal.suite.providers)


def test_goals_are_met_or_missed_by_ratio(tmp_path, capsys, monkeypatch):
    suites = command.suites([])
    easy, hard = {"padded SDPA": 1e-9}, {"padded SDPA": 1e9}
    attention = (suites["elastic_attention"], TINY["elastic_attention"], "forward", torch.float32)
    model = (suites["model"], TINY["model"], "training step", torch.float32)
    goals = [bench_cpu.CpuGoal(*attention, easy), bench_cpu.CpuGoal(*attention, hard)]
    goals.append(bench_cpu.CpuGoal(*model, {"padded": 1e9}))
    monkeypatch.setattr(bench_cpu, "goals", lambda whole_models: goals)
    assert bench_cpu.main(["--quick", "--threads", "1", "--out", str(tmp_path / "rows.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["ok", "MISSED", "MISSED"]
    # Rows: 5 inputs each, 3 tape tokens of which one example in two reads 3.
    saved = 2 * (5 + 3) / (2 * 5 + 3)
    assert float(lines[3].split()[-2]) == pytest.approx(1e9 * saved, rel=1e-3)
    assert "peak memory / padded" in lines[4]
    rows = records.read(tmp_path / "rows.csv")
    assert [r.provider for r in rows] == [
        "torch",
        "torch",
        *[OURS, "padded SDPA"] * 2,
        OURS,
        "padded",
    ]


def test_the_suite_is_collected_where_only_torch_numpy_and_pytest_are_installed():
    absent = ("hypothesis", "safetensors", "sklearn", "matplotlib", "PIL", "tqdm", "xdist")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import pytest; "
        "sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    left_out = r"left out: .*data/test_.*recipes/training/test_train.py\b.* \(PIL is not"
    assert re.search(left_out, result.stdout)
    assert "test_elastic_attention.py: " in result.stdout
