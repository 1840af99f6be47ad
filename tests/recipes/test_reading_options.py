"""`finetune` and `compare` read images as `train` does: with workers, looked at, or skipped."""

import json

import pytest
from checks import refused
from image_files import write_folder

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.compare import compare_calibration, compare_work
from adatape_kernels.recipes.compare.compare_config import CompareConfig
from adatape_kernels.recipes.finetune import finetune_report
from adatape_kernels.recipes.finetune.finetune_folder import PLAN
from adatape_kernels.recipes.training import train

pytest.importorskip("PIL", reason="image folders need Pillow")

TINY = ["--image-size", "8", "--patch", "8", "--dim", "8", "--heads", "1", "--ffn", "8"]
TINY += ["--bank-patch", "4", "--batch", "5"]


def here(tasks, work, jobs, backends):
    """Work in this process, which spares the start of another."""
    for _, task in tasks:
        yield work(task, lambda message: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(finetune_report, "ROUNDS", 1)
    monkeypatch.setattr(pictures, "draw_all", lambda *given: None)
    monkeypatch.setattr(compare_work, "in_processes", here)
    monkeypatch.setattr(compare_calibration, "_LEAST_TIMING", 0.01)


@pytest.fixture
def photos(tmp_path):
    """A folder in which a training image and a test image cannot be read."""
    folder = tmp_path / "photos"
    write_folder(folder / "train", count=6)
    write_folder(folder / "val", count=2)
    bad = [folder / half / "dog" / "1.jpg" for half in ("train", "val")]
    for file in bad:
        file.write_bytes(file.read_bytes()[:50])
    return folder, bad


def test_compare_with_workers_leaves_out_what_cannot_be_read(photos, tmp_path, capsys):
    folder, bad = photos
    tiny = [word for word in TINY if word not in ("--bank-patch", "4")]  # which no ViT has
    words = ["compare", "--data", "imagefolder", "--data-dir", str(folder), *tiny]
    words += ["--models", "vit", "--sizes", "1", "--seeds", "0", "--epochs", "1", "--rounds", "1"]
    assert main([*words, "--out", str(tmp_path / "stopped")]) == 2
    error = capsys.readouterr().err
    assert f"{bad[0]}: expected a whole JPEG" in error
    results = {}
    for look, workers in (("test", "1"), ("test", "0")):
        out = tmp_path / f"{look}-{workers}"
        reading = ["--unreadable", "skip", "--look", look, "--workers", workers]
        assert main([*words, *reading, "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert f"skipped 1 test images that cannot be read: {bad[1]}" in said
        (results[look, workers],) = json.loads((out / "report.json").read_text())["results"]
        assert results[look, workers]["accuracy"] in (0, 1 / 3, 2 / 3, 1)
    for name in ("train_loss", "train_accuracy", "accuracy"):
        assert results["test", "1"][name] == results["test", "0"][name]


def test_finetune_with_workers_leaves_out_what_cannot_be_read(photos, tmp_path, capsys):
    folder, bad = photos
    out = tmp_path / "finetuned"
    words = ["finetune", "--data", "imagefolder", "--data-dir", str(folder), *TINY, "--depth", "1"]
    words += ["--topk", "2", "--num-tape-tokens", "2", "--bank-size", "9", "--epochs", "1"]
    words += ["--source-epochs", "1", "--seeds", "1", "--unreadable", "skip", "--look", "test"]
    assert main([*words, "--workers", "1", "--out", str(out)]) == 0
    assert f"skipped 1 test images that cannot be read: {bad[1]}" in capsys.readouterr().err
    plan = json.loads((out / PLAN).read_text())
    assert plan["loading"] == {"workers": 1, "look": "test"}
    assert plan["options"]["unreadable"] == "skip"
    for name in ("source", "plain-0"):
        saved = checkpoint.load(out / name)
        assert saved.config["unreadable"] == "skip" and saved.environment["workers"] == 1
        assert saved.data["test_images"] == 3
    assert main(["finetune", "--out", str(out), "--resume", "--workers", "0"]) == 0
    assert json.loads((out / PLAN).read_text())["loading"]["workers"] == 0


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    out = str(tmp_path / "out")
    for command in ("finetune", "compare"):
        words = [command, "--data", "imagefolder", "--data-dir", str(tmp_path), "--out", out]
        for reading, said in (
            (["--workers", "2000"], "workers: expected 0 to 1024, got 2000"),
            (["--look", "some"], "look: expected 'all' or 'test'"),
            (["--look", "none", "--unreadable", "skip"], "look: expected all or test"),
        ):
            assert main([*words, *reading]) == 2
            assert said in capsys.readouterr().err
        assert main([command, "--data", "digits", "--unreadable", "skip", "--out", out]) == 2
        assert "unreadable: expected stop for digits" in capsys.readouterr().err
    with refused("workers", "0 for digits", "got 2"):
        CompareConfig(data="digits", epochs=1).loading({"workers": 2})
    assert not (tmp_path / "out").exists()
