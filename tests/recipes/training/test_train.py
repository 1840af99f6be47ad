import csv
import errno
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from checkpoints import in_format_1
from checks import assert_same_bits, refused
from forked_python import Popen
from image_files import write_cifar_binary, write_folder, write_mnist
from safetensors.torch import load_file

from adatape_kernels.cli import main
from adatape_kernels.data import NAMES, augment
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.best_model import BEST
from adatape_kernels.recipes.training.epoch_metrics import METRICS
from adatape_kernels.recipes.training.tensorboard_events import PICTURES
from adatape_kernels.recipes.training.train_config import TrainConfig

TINY = ["--patch", "14", "--bank-patch", "7", "--dim", "16", "--depth", "1", "--heads", "2"]
TINY += ["--ffn", "16", "--num-tape-tokens", "3", "--topk", "2", "--batch", "20"]
EPOCHS = ["--epochs", "3"]


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out the report, which takes seconds and which other tests look at."""
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder, train=1200, test=40)
    return folder


def arguments(mnist, out, *more):
    return ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out), *TINY, *more]


def metrics(out):
    """The rows of metrics.csv without the speed, which differs from run to run."""
    with open(out / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert tuple(row) == METRICS
        assert float(row.pop("images_per_second")) > 0
    return rows


def one_line(capsys, *words):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("adatape-kernels")]
    assert len(lines) == 1 and error.endswith(f"{lines[0]}\n"), error
    assert "Traceback" not in error
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.fixture(scope="module")
def unbroken(mnist, tmp_path_factory):
    """An uninterrupted run, with its report."""
    out = tmp_path_factory.mktemp("unbroken") / "new" / "run"
    assert main(arguments(mnist, out, *EPOCHS)) == 0
    return out


def test_a_run_leaves_report_metrics_model_and_pictures(unbroken):
    found = json.loads((unbroken / "report.json").read_text())
    lengths = found["images_by_tape_length"]
    assert sum(lengths) == found["compared_images"] == 40
    assert found["config"]["dim"] == 16 and found["data"]["train_images"] == 1200
    rows = metrics(unbroken)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_accuracy"]) == found["test_accuracy"] > 0.15
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    mean = sum(length * count for length, count in enumerate(lengths)) / 40
    assert float(rows[-1]["mean_tape_length"]) == pytest.approx(mean)
    model = TrainConfig(**found["config"]).model(10, 1)
    model.load_state_dict(load_file(unbroken / "model.safetensors"))
    for name in ("heatmap", "tape_lengths", "shortest_longest", "costs"):
        assert (unbroken / f"{name}.png").stat().st_size > 5000
    assert {file.stem for file in unbroken.glob("*.png")} <= {*PICTURES}
    assert not list(unbroken.glob("*.part"))


SECONDS = 600  # no run takes longer, however busy the machine is


# The pictures of its report take as long as its training.
WITHOUT_REPORT = """
import runpy
from adatape_kernels.recipes.training import train
train.write_report = lambda *given, **options: None
runpy.run_module("adatape_kernels.cli", run_name="__main__")
"""


def command(*arguments):
    """Start the command in a process of its own, where no earlier test has changed a setting."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return Popen(["-c", WITHOUT_REPORT, *arguments], **quiet)


def test_a_killed_run_resumes_on_the_same_curve(mnist, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert command(*arguments(mnist, whole, *EPOCHS)).wait(SECONDS) == 0
    process = command(*arguments(mnist, out, *EPOCHS))
    try:
        deadline = time.monotonic() + SECONDS
        while not (out / "metrics.csv").exists() or not metrics(out):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)  # in the second epoch
    finally:
        process.kill()
        process.wait()
    assert checkpoint.load(out).epoch in (1, 2)
    assert len(metrics(out)) < 3
    # What it was started with need not be said again.
    assert command("train", "--out", str(out), "--resume").wait(SECONDS) == 0
    assert metrics(out) == metrics(whole)
    ours, theirs = (checkpoint.load(folder).tensors for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(ours[name], tensor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_line_and_the_run_goes_on(
    unbroken, mnist, tmp_path, no_report, monkeypatch, capsys, number
):
    """Whoever runs jobs sends SIGTERM, and a second one changes nothing."""
    steps = []

    def crop(images, *rest):
        steps.append(1)
        if len(steps) == 75:
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)
        return original(images, *rest)

    original = augment.crop
    monkeypatch.setattr(augment, "crop", crop)
    # A shell starts what runs in the background deaf to SIGINT.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(number)
    try:
        assert main(arguments(mnist, tmp_path / "run", *EPOCHS)) == 130
        assert signal.getsignal(number) is before
    finally:
        signal.signal(signal.SIGINT, interrupts)
    one_line(capsys, "interrupted", "epoch 1 of 3", "--resume")
    assert main(arguments(mnist, tmp_path / "run", *EPOCHS, "--resume")) == 0
    assert metrics(tmp_path / "run") == metrics(unbroken)


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    unbroken, mnist, tmp_path, no_report, monkeypatch, capsys
):
    out, original = tmp_path / "run", os.replace

    def full(source, target):
        if target.name.startswith("checkpoint-2"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(arguments(mnist, out, *EPOCHS)) == 2
    one_line(capsys, out / "checkpoint-2.safetensors", "No space left on device")
    monkeypatch.setattr(os, "replace", original)
    assert checkpoint.load(out).epoch == 1
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert metrics(out) == metrics(unbroken)


def test_a_loss_that_is_not_finite_names_epoch_and_step(mnist, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(mnist, out, "--lr", "1e30")) == 2
    one_line(capsys, "loss: expected a finite value at epoch 1, step ")
    assert checkpoint.load(out).epoch == 0


def test_a_finished_run_reports_again(unbroken, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(recipe, "write_report", lambda *given, **options: made.append(given))
    before = metrics(unbroken)
    assert main(["train", "--out", str(unbroken), "--resume"]) == 0
    assert len(made) == 1 and metrics(unbroken) == before


def test_a_folder_in_use_is_not_overwritten(unbroken, mnist, tmp_path, capsys):
    before = (unbroken / INDEX).read_bytes()
    assert main(arguments(mnist, unbroken)) == 2
    one_line(capsys, "out: expected", "--resume", unbroken)
    assert (unbroken / INDEX).read_bytes() == before
    (tmp_path / "letter.txt").touch()
    assert main(arguments(mnist, tmp_path)) == 2
    one_line(capsys, "new or empty folder", "letter.txt")
    assert main(arguments(mnist, tmp_path / "letter.txt")) == 2
    one_line(capsys, "the file")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dim", "32"], ("dim: expected 16", "got 32")),
        (["--seed", "1"], ("seed: expected 0", "got 1")),
        (["--data", "fashion-mnist", "--epochs", "9"], ("data: expected mnist",)),
        (["--epochs", "4", "--lr", "1"], ("lr: expected 0.002", "got 1.0")),
        (["--epochs", "2"], ("epochs: expected 3 or more", "got 2")),
    ],
)
def test_a_run_resumes_only_as_it_was_started(unbroken, capsys, more, words):
    assert main(["train", "--out", str(unbroken), "--resume", *more]) == 2
    one_line(capsys, *words, unbroken / INDEX)


def test_a_run_resumes_only_on_its_images(unbroken, tmp_path, capsys):
    write_mnist(tmp_path, train=1199, test=40)
    assert main(["train", "--out", str(unbroken), "--resume", "--data-dir", str(tmp_path)]) == 2
    one_line(capsys, "data-dir: expected", "train_images 1200, got 1199")


def test_a_foreign_or_damaged_checkpoint_is_one_line(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--resume"]) == 2
    one_line(capsys, "resume: expected", out / INDEX)
    out.mkdir()
    tensors = out / "checkpoint-3.safetensors"
    whole, weights = (unbroken / INDEX).read_text(), (unbroken / tensors.name).read_bytes()

    def resealed(former, latter):
        assert former in whole
        return checkpoint.sealed(json.loads(whole.replace(former, latter))).decode()

    for index, content, words in (
        (whole[:-40], weights, (out / INDEX, "whole JSON")),
        (whole, weights[:-40], (tensors, f"expected {len(weights)} bytes")),
        (whole.replace('"dim": 16', '"dim": 32'), weights, (out / INDEX, "its own SHA-256")),
        (resealed('"dim": 16', '"dim": 32'), weights, (out / INDEX, "of shape")),
        (resealed('"dim": 16', '"dim": "16"'), weights, (out / INDEX, "options of a run")),
        (resealed('"dim": 16,', ""), weights, (out / INDEX, "options of a run")),
        (resealed('"dim": 16', '"dim": 0'), weights, (out / INDEX, "options of a run")),
        (resealed('"train_loss"', '"loss"'), weights, (out / INDEX, "train_loss")),
        (resealed("checkpoint, 2", "checkpoint, 0"), weights, (out / INDEX, "the format")),
    ):
        assert (index, content) != (whole, weights)
        (out / INDEX).write_text(index)
        tensors.write_bytes(content)
        assert main(["train", "--out", str(out), "--resume"]) == 2
        one_line(capsys, *words)


def test_a_checkpoint_of_the_former_option_names_resumes(unbroken, tmp_path, no_report, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for file in (INDEX, "checkpoint-3.safetensors"):
        (out / file).write_bytes((unbroken / file).read_bytes())
    index = json.loads((out / INDEX).read_text())
    config = index["config"]
    config["tape"], config["threshold"] = (
        config.pop("num_tape_tokens"),
        config.pop("halt_threshold"),
    )
    (out / INDEX).write_bytes(in_format_1(index))
    resume = ["train", "--out", str(out), "--resume"]
    assert main([*resume, "--num-tape-tokens", "3", "--halt-threshold", "2"]) == 0
    assert main([*resume, "--num-tape-tokens", "4"]) == 2
    one_line(capsys, "num-tape-tokens: expected 3", "got 4")


def test_other_versions_are_noted(unbroken, tmp_path, no_report, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for file in (INDEX, "checkpoint-3.safetensors", BEST):
        (out / file).write_bytes((unbroken / file).read_bytes())
    index = json.loads((out / INDEX).read_text())
    index["environment"]["torch"] = "2.11.0"
    (out / INDEX).write_bytes(checkpoint.sealed(index))
    assert main(["train", "--out", str(out), "--resume"]) == 0
    one_line_of = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert len(one_line_of) == 1 and "torch was 2.11.0" in one_line_of[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "svhn"], "data: expected one of digits, fashion-mnist"),
        (["--epochs", "0"], "epochs: expected 1 or more, got 0"),
        (["--batch", "0"], "batch: expected 1 or more"),
        (["--lr", "-1"], "lr: expected a number above 0"),
        (["--lr", "nan"], "lr: expected a number above 0"),
        (["--weight-decay", "-1"], "weight-decay: expected 0 or more"),
        (["--halt-threshold", "0"], "halt-threshold: expected a number above 0"),
        (["--seed", "-1"], "seed: expected 0"),
        (["--limit", "1201"], "limit: expected 1 to 1200"),
        (["--image-size", "32"], "image-size: expected 28"),
        (["--patch", "5"], "patch: expected a divisor of image-size = 28, got 5"),
        (["--heads", "3"], "heads: expected a divisor of dim = "),
        (["--topk", "17"], "topk: expected at most 16"),
        (["--variant", "XXL"], "variant: expected"),
        (["--backend", "fpga"], "use_backend: expected"),
    ],
)
def test_bad_options_get_one_line_and_leave_no_folder(mnist, tmp_path, capsys, more, words):
    assert main(arguments(mnist, tmp_path / "run", *more)) == 2
    one_line(capsys, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--epoch-count", "3"], "--epoch-count"),
        (["--epochs", "many"], "--epochs"),
        (["--tape", "3"], "--tape"),
        (["--threshold", "3"], "--threshold"),
        (["extra"], "extra"),
    ],
)
def test_unknown_options_get_one_line(capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        main(["train", *more])
    assert stop.value.code == 2
    one_line(capsys, words)


def test_no_set_gets_one_line(capsys):
    assert main(["train"]) == 2
    one_line(capsys, "data: expected one of", "got None")


def test_a_folder_of_another_set_is_one_line(tmp_path, capsys):
    write_cifar_binary(tmp_path / "cifar")
    run = ["train", "--out", str(tmp_path / "run"), "--data-dir", str(tmp_path / "cifar")]
    assert main([*run, "--data", "mnist"]) == 2
    one_line(capsys, "data-dir: expected train-images-idx3-ubyte")
    assert main([*run, "--data", "imagefolder"]) == 2
    one_line(capsys, "data-dir: expected a folder for each")
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_named_before_training_and_leaves_no_folder(tmp_path, capsys, no_report):
    write_folder(tmp_path / "data" / "train", count=6)
    write_folder(tmp_path / "data" / "val", count=3)
    bad = tmp_path / "data" / "val" / "dog" / "2.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:90])
    run = ["train", "--data", "imagefolder", "--data-dir", str(tmp_path / "data"), *TINY]
    run += ["--image-size", "14", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert main(run) == 2
    one_line(capsys, bad, "expected a whole JPEG or PNG image")
    assert not (tmp_path / "run").exists()
    bad.write_bytes(content)
    assert main(run) == 0
    assert len(metrics(tmp_path / "run")) == 2


def test_coloured_images_are_drawn(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", classes=("cat", "dog", "emu"), count=5)
    monkeypatch.setattr(recipe, "ROUNDS", 1)
    run = ["train", "--data", "imagefolder", "--data-dir", str(tmp_path / "data"), *TINY]
    run += ["--image-size", "14", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(run) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert sum(report["images_by_tape_length"]) == 3
    assert (tmp_path / "run" / "heatmap.png").stat().st_size > 5000


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_every_set_fit_together(name):
    config = TrainConfig.of({"data": name})
    channels = 3 if name in ("cifar10", "imagefolder") else 1
    images = torch.rand(4, channels, config.image_size, config.image_size)
    images = config.augmentation()(images, torch.Generator().manual_seed(0))
    model = config.model(7, channels)
    assert model(images).logits.shape == (4, 7)


def test_a_variant_gives_the_sizes_and_options_go_before_it():
    config = TrainConfig.of({"data": "cifar10", "variant": "Ti/4", "depth": 1})
    found = config.model(10, 3).config
    assert (found.dim, found.depth, found.num_heads, found.ffn_dim) == (192, 1, 3, 768)
    assert (found.patch_size, found.image_size) == (4, 32)
    with refused("image-size", "32"):
        TrainConfig.of({"data": "cifar10", "image_size": 64})
