"""The command `parity`: its files, going on, processes that die, and what it refuses."""

import json
import os
import signal

import pytest
from tiny_training import exit_code

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes.parity import parity_table
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.parity.parity_training import ParityResult, eval_sequences, measure
from adatape_kernels.recipes.parity.parity_workers import Finished

OPTIONS = ["--models", "adatape,transformer", "--seeds", "0", "--steps", "3", "--batch", "8"]
OPTIONS += ["--eval-examples", "50"]


def made_result(run, accuracy=0.5):
    return ParityResult(*run, accuracy, 0.75, 1.5, 100, 3, 0.25, ((3, 0.7, accuracy),))


@pytest.fixture
def trained(monkeypatch):
    """Runs come out at once, and are noted."""
    begun = []

    def in_processes(runs, config, workplace):
        for run in runs:
            begun.append(run)
            yield Finished(run, made_result(run), b"a model")

    monkeypatch.setattr(parity_table, "in_processes", in_processes)
    monkeypatch.setattr(parity_table, "_draw_reads", lambda *arguments: {})
    return begun


def test_the_command_end_to_end(tmp_path, capsys):
    """In real processes: report, picture and models; a second call trains only what is missing."""
    out = tmp_path / "table"
    arguments = ["parity", "--lengths", "4", *OPTIONS, "--out", str(out)]
    assert main([*arguments, "--jobs", "2"]) == 0
    assert "transformer" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert [(r["model"], r["length"], r["seed"]) for r in report["results"]] == [
        ("adatape", 4, 0),
        ("transformer", 4, 0),
    ]
    assert {"accuracy", "seconds", "parameters", "steps"} <= report["results"][0].keys()
    assert (out / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "reads-4.png").read_bytes().startswith(b"\x89PNG")
    assert 0 <= report["pairs_tell_parity"]["4"] <= 1
    model = ak.load(out / "adatape-4-0.safetensors")
    accuracy, _ = measure(model, eval_sequences(4, 50))
    assert accuracy == report["results"][0]["accuracy"]
    before = (out / "adatape-4-0.json").read_bytes()
    assert main([*arguments, "--jobs", "1"]) == 0
    assert (out / "adatape-4-0.json").read_bytes() == before


def test_finished_runs_are_taken_as_they_are(tmp_path, trained):
    small = ParityConfig(lengths=(4,), models=("adatape",), seeds=(0, 1), steps=3)
    parity_table.run(tmp_path, small)
    large = ParityConfig(lengths=(2, 4), models=("adatape",), seeds=(0, 1), steps=3)
    results = parity_table.run(tmp_path, large)
    assert trained == [Run("adatape", n, seed) for n, seed in ((4, 0), (4, 1), (2, 0), (2, 1))]
    assert [(r.length, r.seed) for r in results] == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_other_options_or_files_are_refused_by_name(tmp_path, trained):
    config = ParityConfig(lengths=(4,), models=("adatape",), seeds=(0,), steps=3)
    parity_table.run(tmp_path, config)
    other = ParityConfig(lengths=(4,), models=("adatape",), seeds=(0,), steps=4)
    with pytest.raises(ValueError, match=r"^steps: expected 3, as in .*adatape-4-0.json, got 4$"):
        parity_table.run(tmp_path, other)
    file = tmp_path / "adatape-4-0.json"
    whole = file.read_text()
    for content in ("", "[]", whole[:-20], whole.replace('"seed": 0', '"seed": 1'), "[" * 100_000):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"adatape-4-0.json: expected the result of adatape-4"):
            parity_table.run(tmp_path, config)


def test_a_table_that_fails_keeps_what_is_done(tmp_path, monkeypatch):
    def in_processes(runs, config, workplace):
        yield Finished(runs[0], made_result(runs[0]), b"a model")
        raise RuntimeError(f"{runs[1].stem}: a reason")

    monkeypatch.setattr(parity_table, "in_processes", in_processes)
    config = ParityConfig(lengths=(4,), models=("adatape",), seeds=(0, 1), steps=3)
    with pytest.raises(RuntimeError, match="adatape-4-1: a reason"):
        parity_table.run(tmp_path, config)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [r["seed"] for r in report["results"]] == [0]
    assert not (tmp_path / "adatape-kernels.lock").exists()


def test_a_process_that_is_killed_is_named(tmp_path):
    from adatape_kernels.recipes.parity import parity_workers

    config = ParityConfig(lengths=(8,), models=("transformer",), seeds=(0,), steps=100_000)
    events = parity_workers.in_processes(list(config.runs()), config, parity_workers.Workplace(1))
    assert next(events).run == Run("transformer", 8, 0)
    import multiprocessing

    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"transformer-8-0: expected to end, .* code -9"):
        for _ in events:
            pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lengths", "0"], ["lengths: expected 1 to", "got 0"]),
        (["--lengths", "16,16"], ["lengths: expected one or more distinct"]),
        (["--lengths", "16,,4"], ["--lengths"]),
        (["--models", "adatap"], ["models: expected some of adatape, transformer", "'adatap'"]),
        (["--seeds", "-1"], ["seeds: expected 0 to", "got -1"]),
        (["--steps", "0"], ["steps: expected 1 to", "got 0"]),
        (["--lr", "nan"], ["lr: expected a number"]),
        (["--lr", "-1"], ["lr: expected a number above 0"]),
        (["--curriculum", "1.5"], ["curriculum: expected 0 to 1, got 1.5"]),
        (["--eval-examples", "0"], ["eval-examples: expected 1 to"]),
        (["--protocol", "foo"], ["protocol: expected 'uniform' or 'extrapolate'", "'foo'"]),
        (["--protocol", "extrapolate", "--lengths", "1"], ["lengths: expected 2 or more"]),
        (["--jobs", "0"], ["jobs: expected 1 to"]),
        (["--backend", "cudnn"], ["use_backend: expected one of"]),
    ],
)
def test_refusals_are_one_line_before_anything_is_written(tmp_path, capsys, arguments, words):
    out = tmp_path / "table"
    code = exit_code(["parity", *arguments, "--out", str(out)])
    line = capsys.readouterr().err
    assert code == 2 and len(line.splitlines()) == 1
    assert all(word in line for word in words)
    assert not out.exists()


def test_table_and_picture_of_one_run_and_of_many():
    runs = [Run(model, n, s) for n in (4, 8) for model in ("adatape", "universal") for s in (0, 1)]
    results = [made_result(run, 0.4 + 0.5 * (run.seed == 0)) for run in runs]
    lines = parity_table.table(results).splitlines()
    assert len(lines) == 2 + 4
    assert "65.00%" in lines[2] and "40.00% to   90.00%" in lines[2]
    for some in (results[:1], results):
        assert parity_table.drawn(some).startswith(b"\x89PNG")
