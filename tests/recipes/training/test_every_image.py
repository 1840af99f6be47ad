"""An epoch uses every image, in batches that suit the set, and earlier runs go on as they began."""

import json

import pytest
import torch
from checkpoints import in_format_1
from checks import assert_same_bits, refused
from image_files import write_mnist

from adatape_kernels.cli import main
from adatape_kernels.data import ImageSet, Normaliser, augment
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.recipes import checkpoint, demo
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training import train_defaults
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.training.train_plan import TrainPlan

TINY = ["--patch", "14", "--bank-patch", "7", "--dim", "16", "--depth", "1", "--heads", "2"]
TINY += ["--ffn", "16", "--num-tape-tokens", "3", "--topk", "2", "--epochs", "3"]


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """144 images for training, and no report, which takes seconds."""
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)
    write_mnist(tmp_path / "mnist", train=144, test=20)
    return tmp_path / "mnist"


def arguments(mnist, out, *more):
    return ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out), *TINY, *more]


@pytest.mark.parametrize(
    ("images", "batch", "steps", "used", "dropping"),
    [
        (144, 128, 2, 144, 1),
        (144, 144, 1, 144, 1),
        (144, 1000, 1, 144, 1),
        (145, 144, 2, 145, 1),
        (7, 2, 4, 7, 3),
    ],
)
def test_the_steps_of_an_epoch(images, batch, steps, used, dropping):
    plan = TrainPlan(epochs=1, batch=batch, learning_rate=1e-3)
    assert (plan.steps_per_epoch(images), plan.images_per_epoch(images)) == (steps, used)
    earlier = TrainPlan(epochs=1, batch=batch, learning_rate=1e-3, drop_rest=True)
    assert earlier.steps_per_epoch(images) == dropping
    assert earlier.images_per_epoch(images) == min(images, dropping * batch)


def test_every_image_is_trained_on_in_every_epoch(mnist, tmp_path, monkeypatch, capsys):
    sizes, original = [], augment.crop

    def crop(images, *rest):
        sizes.append(len(images))
        return original(images, *rest)

    monkeypatch.setattr(augment, "crop", crop)
    assert main(arguments(mnist, tmp_path / "run", "--batch", "50")) == 0
    assert sizes == [50, 50, 44] * 3
    assert checkpoint.load(tmp_path / "run").step == 9
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "144 training images, 20 test images, 10 classes; batch 50, 3 steps an epoch, "
        "the last of 44 images"
    )


@pytest.mark.parametrize(
    ("name", "images", "batch"),
    [
        ("mnist", 60_000, 128),
        ("mnist", 1280, 128),
        ("mnist", 1279, 127),
        ("mnist", 144, 14),
        ("mnist", 9, 1),
        ("mnist", 1, 1),
        ("digits", 1437, 48),
        ("digits", 100, 10),
    ],
)
def test_the_default_batch_leaves_ten_steps(name, images, batch):
    config = TrainConfig.of({"data": name})
    assert config.with_batch_for(images).batch == batch
    given = TrainConfig.of({"data": name, "batch": 99})
    assert given.with_batch_for(images).batch == 99


def test_a_batch_that_no_memory_holds_is_named():
    config = TrainConfig.of({"data": "imagefolder", "image_size": 8000, "patch": 80})
    assert config.with_batch_for(144).batch == 14
    with refused("image-size", "a batch of 100 images", "8000"):
        config.with_batch_for(1000)


def test_the_chosen_batch_is_said_and_saved(mnist, tmp_path, capsys):
    assert main(arguments(mnist, tmp_path / "run")) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "batch 14, 11 steps an epoch, the last of 4 images (chosen by the set's size" in first
    assert checkpoint.load(tmp_path / "run").config["batch"] == 14
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "chosen" not in capsys.readouterr().out.splitlines()[0]
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--batch", "128"]) == 2


def test_a_run_of_version_01_goes_on_on_its_own_curve(mnist, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as earlier:
        earlier.setitem(train_defaults.DEFAULTS, "drop_rest", True)
        assert main(arguments(mnist, tmp_path / "whole", "--batch", "50")) == 0
        assert checkpoint.load(tmp_path / "whole").step == 6

        def stop(*arguments):
            raise KeyboardInterrupt

        original, saves = checkpoint.save, []

        def save(folder, saved):
            original(folder, saved)
            saves.append(saved.epoch)
            if saved.epoch == 1:
                stop()

        earlier.setattr(checkpoint, "save", save)
        assert main(arguments(mnist, tmp_path / "run", "--batch", "50")) == 130
    index = json.loads((tmp_path / "run" / INDEX).read_text())
    assert index["config"].pop("drop_rest") is True  # the earlier version knew no such entry
    (tmp_path / "run" / INDEX).write_bytes(in_format_1(index))
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "44 images are left out in each epoch" in capsys.readouterr().out
    ours, theirs = (checkpoint.load(tmp_path / name) for name in ("run", "whole"))
    assert ours.step == theirs.step == 6
    for name, tensor in theirs.tensors.items():
        assert_same_bits(ours.tensors[name], tensor)


def test_the_tried_step_leaves_no_trace(monkeypatch):
    model = TrainConfig.of({"data": "digits"}).model(10, 1).eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Execution().try_step(model, torch.zeros(1, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])


class WithBatchNorm(AdaTapeViT):
    """A model that needs the statistics of a batch."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.BatchNorm2d(1)

    def embed(self, inputs):
        return super().embed(self.norm(inputs))


def test_a_batch_norm_is_named_where_one_image_is_left_over():
    images, labels = torch.rand(9, 1, 8, 8), torch.arange(9) % 10
    data = ImageSet(images, labels, images, labels, tuple("0123456789"))
    model, normalise = WithBatchNorm(demo.CONFIG), Normaliser.of(images)
    plan = TrainPlan(epochs=1, batch=4, learning_rate=1e-3)
    with refused("batch", "9", "batch norm norm", "got 4"):
        train(model, data, plan, normalise, augment.turn_and_move)
    plan = TrainPlan(epochs=1, batch=5, learning_rate=1e-3)
    train(model, data, plan, normalise, augment.turn_and_move)
