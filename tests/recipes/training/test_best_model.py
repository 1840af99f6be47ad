"""best.safetensors: the parameters of the epoch that was best on the test images."""

import errno
import json
import os

import pytest
from checks import assert_same_bits, refused
from image_files import write_mnist
from tiny_training import TINY, stop_after

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.distributed.sharded_evaluation import Evaluation
from adatape_kernels.recipes.model_tensors import evaluated_weights
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.best_model import BEST, best_entry, check_best

ACCURACIES = (0.3, 0.5, 0.5, 0.4)
RUN = {**TINY, "epochs": 4, "ema": 0.5}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best_mnist")
    write_mnist(folder, train=40, test=10)
    return folder


@pytest.fixture(autouse=True)
def reported(monkeypatch):
    """Leaves the report out, and keeps what it would hold; tests are as good as ACCURACIES say."""
    entries = []

    def evaluated(model, data, normalise, dtype, ranks, when):
        return Evaluation(ACCURACIES[int(when.split()[-1]) - 1], 1.0)

    monkeypatch.setattr(recipe, "evaluated", evaluated)
    monkeypatch.setattr(recipe, "write_report", lambda *given, **_: entries.append(given[4]))
    return entries


@pytest.fixture(scope="module")
def of_epochs(mnist, tmp_path_factory):
    """What is evaluated after each epoch of an unbroken run."""
    found, original = {}, checkpoint.save

    def save(run, saved):
        found[saved.epoch] = evaluated_weights(saved.tensors)
        original(run, saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr(recipe, "write_report", lambda *given, **_: None)
        recipe.run(tmp_path_factory.mktemp("unbroken") / "run", RUN, data_dir=mnist)
    return found


def assert_best_is(out, expected):
    found = ak.load(out / BEST).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)


def test_the_first_of_the_best_epochs_is_kept(mnist, tmp_path, of_epochs, reported, capsys):
    out = tmp_path / "run"
    recipe.run(out, RUN, data_dir=mnist)
    assert_best_is(out, of_epochs[2])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("best epoch: 2 of 4, test accuracy 50.00%, in best.safetensors;")
    assert "flatters" in last
    assert reported[0]["best"] == {"file": BEST, "epoch": 2, "test_accuracy": 0.5}
    model, unfinished = ak.load(out / BEST), ak.load(out)
    assert model.config == unfinished.config and model.class_names == unfinished.class_names
    assert model.preprocessing == unfinished.preprocessing is not None
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_run_that_was_killed_around_its_best_epoch(
    mnist, tmp_path, monkeypatch, of_epochs, reported, epoch, checkpointed
):
    """Behind the checkpoint and before the best model's file, or before both."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, epoch, before_the_rest=checkpointed)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, RUN, data_dir=mnist)
    if epoch < 3:
        assert (out / BEST).exists() == (epoch == 2)  # the first epoch's
    recipe.run(out, {}, resume=True)
    assert_best_is(out, of_epochs[2])
    assert reported[-1]["best"]["epoch"] == 2


def test_a_disk_that_is_full_for_the_best_model(mnist, tmp_path, monkeypatch, of_epochs, capsys):
    out, original = tmp_path / "run", os.replace

    def full(source, target):
        if target.name == BEST and (out / BEST).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=rf"{BEST}: expected to write .* No space left"):
            recipe.run(out, RUN, data_dir=mnist)
    assert checkpoint.load(out).epoch == 2
    assert_best_is(out, of_epochs[1])
    recipe.run(out, {}, resume=True)
    assert_best_is(out, of_epochs[2])
    assert "best.safetensors is not that" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["removed", "altered"])
def test_a_file_that_is_lost_is_said_and_replaced(
    mnist, tmp_path, of_epochs, reported, capsys, how
):
    out = tmp_path / "run"
    recipe.run(out, RUN, data_dir=mnist)
    content = (out / BEST).read_bytes()
    (out / BEST).unlink()
    if how == "altered":
        (out / BEST).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    for notes in (1, 0):  # afterwards the checkpoint knows of it
        assert main(["train", "--resume", "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert said.count("note: best.safetensors is not that of epoch 2, which was best") == notes
        assert_best_is(out, of_epochs[4])
        assert reported[-1]["best"]["epoch"] == 4


def test_a_run_of_an_earlier_version_begins_with_what_it_has(
    mnist, tmp_path, monkeypatch, of_epochs, reported, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, RUN, data_dir=mnist)
    index = json.loads((out / INDEX).read_text())
    for name in ("sha256 of this file", "best"):
        index.pop(name)
    (out / INDEX).write_bytes(checkpoint.sealed(index))
    (out / BEST).unlink()
    recipe.run(out, {}, resume=True)
    assert_best_is(out, of_epochs[3])
    assert reported[-1]["best"] == {"file": BEST, "epoch": 3, "test_accuracy": 0.5}
    assert "best.safetensors" not in capsys.readouterr().err
    assert checkpoint.load(out).best["since"] == 3


ENTRY = best_entry(2, 1, b"")
HISTORY = [{"epoch": n, "test_accuracy": value} for n, value in enumerate(ACCURACIES, start=1)]


def test_what_fits_the_metrics_is_known():
    check_best(None, [])
    check_best(ENTRY, HISTORY)
    check_best({**ENTRY, "epoch": 3, "since": 3}, HISTORY)


@pytest.mark.parametrize(
    "altered",
    [
        5,
        [2],
        {"epoch": 2},
        {**ENTRY, "more": 1},
        {**ENTRY, "epoch": 1},
        {**ENTRY, "epoch": 3},
        {**ENTRY, "epoch": 2.0},
        {**ENTRY, "epoch": 5},
        {**ENTRY, "since": 0},
        {**ENTRY, "since": 3},
        {**ENTRY, "sha256": "x"},
        {**ENTRY, "sha256": None},
    ],
)
def test_what_does_not_is_refused(altered):
    with pytest.raises(ValueError, match=r"^best(: \w+)?: expected .*, got "):
        check_best(altered, HISTORY)
    with refused("best", "before the first epoch"):
        check_best(ENTRY, [])
