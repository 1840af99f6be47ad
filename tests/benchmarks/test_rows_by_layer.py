"""The picture of rows alive in each layer: what is measured of runs, drawn and refused."""

import json
from dataclasses import asdict

import pytest
import torch
from checks import refused
from image_files import write_mnist

import adatape_kernels as ak
from adatape_kernels.benchmarks.reports import rows_by_layer
from adatape_kernels.data import Preprocessing
from adatape_kernels.recipes.training.train_config import TrainConfig

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
SIZES = {"data": "mnist", "patch": 14, "dim": 16, "depth": 3, "heads": 2, "ffn": 16}


def run_of(folder, name, **options):
    config = TrainConfig.of({**SIZES, "model_name": name, **options})
    torch.manual_seed(0)
    ak.save(config.model(10, 1), folder, preprocessing=Preprocessing(28, 1, (0.5,), (0.5,)))
    (folder / "report.json").write_text(json.dumps({"config": asdict(config)}))
    return folder


def test_runs_are_measured_and_drawn(tmp_path):
    write_mnist(tmp_path / "mnist", train=20, test=30)
    runs = [run_of(tmp_path / "avit", "avit", gate_center=0.0), run_of(tmp_path / "uvit", "uvit")]
    found, picture = tmp_path / "found.json", tmp_path / "found.png"
    given = ["--data-dir", str(tmp_path / "mnist"), "--images", "8", "--repeats", "2"]
    given += ["--json", str(found), "--png", str(picture)]
    rows_by_layer.main([*map(str, runs), *given])
    models = json.loads(found.read_text())["models"]
    assert [model["model"] for model in models] == ["AViT", "UViT"]
    for model in models:
        assert model["test_images"] == 30 and model["rows_of_an_image"] == 5
        assert model["rows_by_layer"][0] == 150 >= model["rows_by_layer"][-1]
        assert [step["rows"] for step in model["masks"]] == len(model["masks"]) * [40]
        assert model["leaves"][0]["rows"] == 40 and model["leaves"][0]["milliseconds"] > 0
    assert picture.stat().st_size > 10_000
    recorded = json.loads(rows_by_layer.RESULT.read_text())
    assert {"machine", "torch", "commit", "models"} <= recorded.keys()
    assert all(model["test_accuracy"] > 0.8 for model in recorded["models"])


def test_a_run_of_a_model_that_halts_nothing_is_refused(tmp_path):
    with refused("run", "halts", "plain"):
        rows_by_layer.measure(run_of(tmp_path / "plain", "vit"), None, 8, 1)
