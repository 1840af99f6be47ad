"""`train --tensorboard`: what is written, that it goes on, and what a missing package says."""

import errno
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from checks import refused
from image_files import write_mnist
from tiny_training import TINY, curve, stop_after

from adatape_kernels.cli import main
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.tensorboard_events import FOLDER

MODULE = "torch.utils.tensorboard"
RUN = {**TINY, "epochs": 3}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events_mnist")
    write_mnist(folder, train=40, test=10)
    return folder


@pytest.fixture(autouse=True)
def two_pictures(monkeypatch):
    """Draws two small pictures in the place of a report."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

    def write(out, *given, **options):
        for shade, name in enumerate(("costs", "heatmap"), start=1):
            image.new("RGB", (3, 2), (40 * shade, 0, 0)).save(out.folder / f"{name}.png")
        image.new("RGB", (1, 1)).save(out.folder / "letter.png")

    monkeypatch.setattr(recipe, "write_report", write)


class FakeWriter:
    """Takes the place of torch's writer, and makes a file as that does."""

    made: list["FakeWriter"]

    def __init__(self, log_dir, purge_step=None):
        self.folder, self.purge_step = log_dir, purge_step
        self.scalars, self.images, self.flushed, self.closed = [], [], 0, False
        self.made.append(self)
        folder = Path(log_dir)
        folder.mkdir(exist_ok=True)
        (folder / f"events.out.tfevents.{len(self.made)}").touch()

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step, value))
        self.flushed = -1

    def add_image(self, name, pixels, step, dataformats):
        assert dataformats == "HWC" and pixels.shape == (2, 3, 3)
        self.images.append((name, step, int(pixels[0, 0, 0])))

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    module = types.ModuleType(MODULE)
    module.SummaryWriter = type("WriterOfOneTest", (FakeWriter,), {"made": []})
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module.SummaryWriter.made


def expected_scalars(out, first=1):
    return [
        (name, epoch, float(value))
        for epoch, row in enumerate(curve(out), start=1)
        for name, value in row.items()
        if name != "epoch" and epoch >= first
    ]


def without_speed(scalars):
    return [(name, step, float(value)) for name, step, value in scalars if "per_second" not in name]


def test_each_column_and_the_pictures_are_written(mnist, tmp_path, writers):
    out = tmp_path / "run"
    recipe.run(out, RUN, data_dir=mnist, tensorboard=True)
    (writer,) = writers
    assert writer.folder == str(out / FOLDER) and writer.purge_step is None
    assert without_speed(writer.scalars) == expected_scalars(out)
    assert {name for name, *_ in writer.scalars} >= {"learning_rate", "images_per_second"}
    assert sorted(writer.images) == [("costs", 3, 40), ("heatmap", 3, 80)]
    assert writer.flushed == len(writer.scalars) and writer.closed


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_resumed_run_goes_on_where_it_stopped(
    mnist, tmp_path, writers, monkeypatch, checkpointed
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, before_the_rest=checkpointed)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, RUN, data_dir=mnist, tensorboard=True)
    # Nothing of an epoch that has a checkpoint may be missing.
    assert writers[0].flushed == len(writers[0].scalars) == 2 * 6 and writers[0].closed
    assert main(["train", "--resume", "--out", str(out)]) == 0
    done = 2 if checkpointed else 1
    assert writers[1].purge_step == done + 1
    assert without_speed(writers[1].scalars) == expected_scalars(out, done + 1)
    # Without anything to train the pictures are drawn anew, behind the last epoch.
    assert main(["train", "--resume", "--out", str(out), "--epochs", "3"]) == 0
    assert writers[2].purge_step == 4 and not writers[2].scalars and len(writers[2].images) == 2
    assert main(["train", "--resume", "--out", str(out), "--no-tensorboard"]) == 0
    assert len(writers) == 3


def test_a_run_that_asks_for_it_later_has_its_first_epochs_too(mnist, tmp_path, writers):
    out = tmp_path / "run"
    recipe.run(out, RUN, data_dir=mnist)
    assert not writers and not (out / FOLDER).exists()
    recipe.run(out, {"epochs": 4}, resume=True, tensorboard=True)
    assert writers[0].purge_step is None
    assert without_speed(writers[0].scalars) == expected_scalars(out)


def test_events_that_cannot_be_written_cost_no_epoch(mnist, tmp_path, writers, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FakeWriter, "flush", full)
    out = tmp_path / "run"
    with pytest.raises(OSError, match="No space left"):
        recipe.run(out, RUN, data_dir=mnist, tensorboard=True)
    assert len(curve(out)) == 1
    recipe.run(out, {}, resume=True, tensorboard=False)
    assert len(curve(out)) == 3


def test_a_missing_package_is_one_line_before_training(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, MODULE, None)
    out = tmp_path / "run"
    run = ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out)]
    assert main([*run, "--tensorboard"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    assert "tensorboard: expected tensorboard to be installed (pip install 'adatape-" in error
    for value in (1, "yes", [True]):
        with refused("tensorboard"):
            recipe.run(out, RUN, data_dir=mnist, tensorboard=value)
    assert not out.exists()


def test_tensorboard_reads_what_torch_writes(mnist, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, before_the_rest=False)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, RUN, data_dir=mnist, tensorboard=True)
    recipe.run(out, {}, resume=True)
    events = EventAccumulator(str(out / FOLDER))
    events.Reload()
    for name in curve(out)[0]:
        if name != "epoch":
            found = events.Scalars(name)
            assert [event.step for event in found] == [1, 2, 3], name
            values = torch.tensor([float(row[name]) for row in curve(out)])
            assert torch.allclose(torch.tensor([event.value for event in found]), values)
    assert sorted(events.Tags()["images"]) == ["costs", "heatmap"]
    assert [image.step for image in events.Images("costs")] == [3]
