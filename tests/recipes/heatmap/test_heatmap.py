"""The command `heatmap` on runs of the digits: pictures, numbers, and what it refuses."""

import json

import numpy as np
import pytest
import torch

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes.heatmap import heatmap
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.training.train_loop import predict


def test_pictures_and_numbers_of_a_bank_of_patches(runs, tmp_path, capsys):
    assert main(["heatmap", str(runs / "input"), "--out", str(tmp_path / "h")]) == 0
    assert "of the reads fall on the middle quarter" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "h").iterdir()}
    assert names == {"report.json", "heatmap.png", "steps.png", "examples.png", "lengths.png"}
    report = json.loads((tmp_path / "h" / "report.json").read_text())
    model, data = ak.load(runs / "input"), images_of_run(runs / "input")
    output = predict(model, data.test_images, normaliser_of(model))
    assert report["lengths"]["mean"] == output.tape_lens.double().mean().item()
    right = output.logits.argmax(1) == data.test_labels
    wrong = output.tape_lens[~right].double().mean().item()
    assert report["lengths"]["wrong"] == pytest.approx(wrong)
    (read,) = report["reads"]
    share = np.asarray(read["share_by_patch"])
    reads_of_first = (output.reads[0].indices == 0).flatten(1).any(1).double().mean().item()
    assert share.shape == (8, 8) and share[0, 0] == pytest.approx(reads_of_first)
    assert read["uniform_share"] == 0.25


def test_single_images_and_other_runs_beside(runs, tmp_path):
    from PIL import Image

    file = tmp_path / "Ba$$in 図.png"
    Image.fromarray(np.full((20, 20), 90, dtype=np.uint8)).save(file)
    both = heatmap.run(
        runs / "input", tmp_path / "h", images=[file, file], beside=[runs / "input"]
    )["beside"]
    assert [entry["patch"] for entry in both] == [4, 4]
    assert both[0]["share_by_patch"] == both[1]["share_by_patch"]
    assert (tmp_path / "h" / "beside.png").read_bytes().startswith(b"\x89PNG")


def test_entries_of_a_learnable_bank(runs, tmp_path, capsys):
    report = heatmap.run(runs / "learn", tmp_path / "h")
    assert "entries are never read" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "h").iterdir()}
    assert names == {"report.json", "entries.png", "lengths.png"}
    (read,) = report["reads"]
    assert len(read["counts"]) == read["bank_size"] == 30
    assert read["dead_entries"] == read["counts"].count(0)


def test_images_of_a_run_are_those_that_it_was_tested_on(runs):
    data = images_of_run(runs / "input")
    report = json.loads((runs / "input" / "report.json").read_text())
    model = ak.load(runs / "input")
    logits = predict(model, data.test_images, normaliser_of(model)).logits
    right = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert right == report["test_accuracy"]


@pytest.mark.parametrize(
    "source, arguments, words",
    [
        ("vit", [], ["run: expected that of an AdaTape of images that reads"]),
        ("none", [], ["none", "which is not there"]),
        ("", [], ["has neither"]),
        ("learn", ["IMAGE"], ["images: expected none for a learnable bank"]),
        ("input", ["--beside", "LEARN"], ["beside: expected runs whose bank is", "got learn"]),
        ("input", ["--data-dir", "/nowhere"], ["data-dir: expected none for digits"]),
        ("input", ["missing.png"], ["missing.png"]),
    ],
)
def test_refusals_are_one_line(runs, tmp_path, capsys, source, arguments, words):
    given = [str(runs / "learn") if word == "LEARN" else word for word in arguments]
    out = tmp_path / "h"
    assert main(["heatmap", str(runs / source), *given, "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and all(word in line for word in words)
    assert not out.exists()


def test_a_model_that_never_reads_is_drawn(runs, tmp_path):
    """With a threshold of 0 nobody reads: no share is known, and pictures are empty."""
    import shutil

    shutil.copytree(runs / "input", tmp_path / "run")
    model = ak.load(tmp_path / "run", halt_threshold=0.0)
    preprocessing, names = model.preprocessing, model.class_names
    (tmp_path / "run" / "model.safetensors").unlink()
    ak.save(model, tmp_path / "run", class_names=names, preprocessing=preprocessing)
    report = heatmap.run(tmp_path / "run", tmp_path / "h")
    assert report["reads"][0]["centre_share"] is None
    assert report["lengths"]["mean"] == 0 and report["lengths"]["correlation_with_loss"] is None
    assert not torch.tensor(report["reads"][0]["share_by_patch"]).any()
