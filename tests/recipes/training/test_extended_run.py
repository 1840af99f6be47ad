"""`train --resume --epochs N`: a run that goes on to another number of epochs."""

import json

import pytest
from checks import refused
from image_files import write_mnist
from tiny_training import TINY, assert_same_run, curve, stop_after

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.saved_run import saved_run

RUN = {**TINY, "ema": 0.9, "warmup_share": 0.5}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended_mnist")
    write_mnist(folder, train=40, test=10)
    return folder


def rates(out):
    return [float(row["learning_rate"]) for row in curve(out)]


def test_a_longer_run_has_the_rates_of_its_new_length(mnist, tmp_path, capsys):
    out = tmp_path / "run"
    recipe.run(out, RUN, data_dir=mnist)
    before = curve(out)
    assert main(["train", "--resume", "--out", str(out), "--epochs", "4"]) == 0
    said = capsys.readouterr().err
    assert said.count("note: the run of 2 epochs goes on from epoch 2 to epoch 4") == 1
    saved = saved_run(out, {"epochs": 4})
    assert saved.extended == [{"after_epoch": 2, "epochs": 4, "before": 2}]
    assert saved.config["epochs"] == saved.epoch == 4 and curve(out)[:2] == before
    recipe.run(tmp_path / "whole", {**RUN, "epochs": 4}, data_dir=mnist)
    # Two steps an epoch; the rates of the whole run begin to fall when the short one has ended.
    assert rates(out)[2:] == rates(tmp_path / "whole")[2:] != rates(out)[:2]
    assert curve(out)[2:] != curve(tmp_path / "whole")[2:]


def test_an_extended_run_resumes_on_its_curve(mnist, tmp_path, monkeypatch, capsys):
    for name in ("unbroken", "run"):
        recipe.run(tmp_path / name, {**RUN, "epochs": 1}, data_dir=mnist)
    recipe.run(tmp_path / "unbroken", {"epochs": 3}, resume=True)
    with monkeypatch.context() as patch:
        # Killed within the extension's first epoch, the run knows its new length all the same.
        stop_after(patch, 2, before_the_rest=False)
        with pytest.raises(KeyboardInterrupt, match="holds epoch 1 of 3"):
            recipe.run(tmp_path / "run", {"epochs": 3}, resume=True)
    assert checkpoint.load(tmp_path / "run").config["epochs"] == 3
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(tmp_path / "run", {}, resume=True)
    recipe.run(tmp_path / "run", {}, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    assert "goes on from epoch" in capsys.readouterr().err
    # Once more, and then to no more than is done.
    recipe.run(tmp_path / "run", {"epochs": 4}, resume=True)
    found = checkpoint.load(tmp_path / "run")
    assert [entry["before"] for entry in found.extended] == [1, 3] and found.epoch == 4
    with refused("epochs", "4 or more", INDEX, "got 3"):
        recipe.run(tmp_path / "run", {"epochs": 3}, resume=True)
    for value in (0, 2.5, "5", True):
        with refused("epochs"):
            recipe.run(tmp_path / "run", {"epochs": value}, resume=True)
    assert not recipe.finished(tmp_path / "run", {})  # it has no report
    with refused("epochs", "4, as in", "got 5"):
        recipe.finished(tmp_path / "run", {"epochs": 5})


def test_an_interrupted_run_may_end_sooner(mnist, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, {**RUN, "epochs": 9}, data_dir=mnist)
    recipe.run(out, {"epochs": 2}, resume=True)
    assert len(curve(out)) == 2 and checkpoint.load(out).extended[0]["before"] == 9


@pytest.mark.parametrize(
    "altered",
    [
        [],
        {},
        None,
        [3],
        [{"after_epoch": 1}],
        [{"after_epoch": 3, "epochs": 2, "before": 1}],
        [{"after_epoch": 1, "epochs": 3, "before": 1}],
        [{"after_epoch": 1, "epochs": 2, "before": 0}],
        [{"after_epoch": True, "epochs": 2, "before": 1}],
        [
            {"after_epoch": 1, "epochs": 4, "before": 1},
            {"after_epoch": 1, "epochs": 2, "before": 3},
        ],
        [
            {"after_epoch": 2, "epochs": 4, "before": 2},
            {"after_epoch": 1, "epochs": 2, "before": 4},
        ],
    ],
)
def test_altered_extensions_are_one_line(extended, altered):
    index = json.loads((extended / INDEX).read_text())
    index.pop("sha256 of this file")
    (extended / INDEX).write_bytes(checkpoint.sealed({**index, "extended": altered}))
    with pytest.raises(ValueError, match="extended") as stop:
        saved_run(extended, {})
    assert str(extended / INDEX) in str(stop.value) and "\n" not in str(stop.value)


@pytest.fixture(scope="module")
def extended(mnist, tmp_path_factory):
    """A run of an epoch that went on to two."""
    out = tmp_path_factory.mktemp("extended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "write_report", lambda *arguments, **options: None)
        recipe.run(out, {**RUN, "epochs": 1}, data_dir=mnist)
        recipe.run(out, {"epochs": 2}, resume=True)
    return out
