"""A run's folder says what it was computed with, and that gives the same curve again."""

import json
import platform
import runpy
import sys

import numpy
import pytest
import torch
from image_files import write_mnist
from tiny_training import TINY, assert_same_run

from adatape_kernels._build import VERSION
from adatape_kernels.cli import main
from adatape_kernels.recipes import machine, run_environment
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.run_options import CONFIG


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5, "split_seed": 2, "limit": 39, "mixup": 0.3, "random_erasing": 0.5, "ema": 0.9},
        {"halt_threshold_range": (0.5, 2.5), "loss": "sigmoid", "bank": "learn", "bank_size": 9}
        | {"bank_patch": None},
    ],
)
def test_what_a_folder_records_gives_its_curve_again(tmp_path, options):
    write_mnist(tmp_path / "data", train=40, test=10)
    how = {"accumulate": 2}
    recipe.run(tmp_path / "one", {**TINY, **options}, data_dir=tmp_path / "data", execution=how)
    saved = json.loads((tmp_path / "one" / INDEX).read_text())
    torch.rand(7)  # what the process has drawn before does not matter
    there = saved["environment"]
    again = {name: there[name] for name in Execution().entries()}
    loading = {name: there[name] for name in ("look",)}
    recipe.run(
        tmp_path / "other",
        saved["config"],
        data_dir=there["data_dir"],
        execution=again,
        loading=loading,
    )
    assert_same_run(tmp_path / "one", tmp_path / "other")
    found = json.loads((tmp_path / "other" / INDEX).read_text())
    for name in ("config", "data", "environment"):
        assert found[name] == saved[name]
    assert found["config"]["seed"] == options.get("seed", 0)


@pytest.mark.parametrize(
    "more",
    [
        ["--data", "digits", "--limit", "40", "--epochs", "1", "--batch", "20"],
        ["--model", "vit", "--accumulate", "2", "--weight-decay", "0.2"],
        ["--halt-threshold-range=0.5,2.5", "--seed", "3", "--workers", "0", "--loss", "sigmoid"],
    ],
)
def test_its_file_of_options_trains_the_same_run(tmp_path, more):
    sizes = {name: TINY[name] for name in ("dim", "depth", "heads", "ffn")}
    if "digits" not in more:
        write_mnist(tmp_path / "data", train=40, test=10)
        more = ["--data", "mnist", "--data-dir", str(tmp_path / "data"), "--patch", "14", *more]
        more = ["--epochs", "2", *more]
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, *more, "--out", str(tmp_path / "one")]) == 0
    file = tmp_path / "one" / CONFIG
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "other")]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "other")
    one, other = (json.loads((tmp_path / n / INDEX).read_text()) for n in ("one", "other"))
    assert other["config"] == one["config"] and other["environment"] == one["environment"]
    assert (tmp_path / "other" / CONFIG).read_text() == file.read_text()


def test_a_run_that_began_with_a_model_names_it_in_its_file(tmp_path):
    write_mnist(tmp_path / "data", train=40, test=10)
    recipe.run(tmp_path / "first", {**TINY, "epochs": 1}, data_dir=tmp_path / "data")
    given = {"data": "mnist", "epochs": 1, "batch": 20}
    where = {"data_dir": tmp_path / "data", "init": tmp_path / "first"}
    recipe.run(tmp_path / "one", given, **where)
    file = tmp_path / "one" / CONFIG
    assert f'init: "{tmp_path / "first"}"\n' in file.read_text()
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "other")]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_versions_and_commit_are_recorded(capsys):
    found = run_environment.run_environment(None, "eager", torch.device("cpu"), Execution())
    here = machine.environment()
    assert found["adatape_kernels"] == VERSION and found["torch"] == torch.__version__
    assert found["python"] == platform.python_version() and found["numpy"] == numpy.__version__
    assert found["commit"] == here["commit"]
    run_environment.note_differences({**found, "numpy": "1.2", "commit": "abc"}, found)
    said = capsys.readouterr().err
    assert "note: numpy was 1.2 and is " in said and "note: commit was abc and is " in said
    # Runs of earlier versions say nothing of some.
    older = {n: v for n, v in found.items() if n not in ("commit", "python", "numpy")}
    run_environment.note_differences(older, found)
    assert capsys.readouterr().err == ""


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adatape_kernels", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("adatape_kernels", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out == f"{VERSION}\n"
    monkeypatch.setattr(sys, "argv", ["adatape_kernels", "train", "--resume", "--out", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("adatape_kernels", run_name="__main__")
    assert stop.value.code == 2 and "resume: expected nowhere" in capsys.readouterr().err
