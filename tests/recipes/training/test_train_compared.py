"""`train --model`: each model that AdaTape is compared with trains, resumes, reports and loads."""

import csv
import json
import re

import pytest
import torch
from checks import refused
from image_files import write_mnist

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, load
from adatape_kernels.models import AdaTapeOutput, HaltedUnits
from adatape_kernels.recipes.joined_outputs import joined
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.saved_options import with_present_names
from adatape_kernels.recipes.training.tensorboard_events import PICTURES
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import predict

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

SIZES = ["--patch", "14", "--dim", "16", "--depth", "3", "--heads", "2", "--ffn", "16"]
SIZES += ["--batch", "20", "--epochs", "1"]
MODELS = {
    "vit": (ak.models.ViT, []),
    "uvit": (ak.models.UViT, ["--act-epsilon", "0.3", "--ponder-weight", "0.2"]),
    "avit": (ak.models.AViT, ["--gate-center", "0", "--distribution-weight", "0.1"]),
    "u2t_tiny_patch16_224": (ak.models.UViT, ["--act-level", "row", "--leave", "row"]),
}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared_mnist")
    write_mnist(folder, train=100, test=30)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_resumes_reports_and_loads(mnist, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(recipe, "ROUNDS", 1)
    kind, options = MODELS[name]
    out = tmp_path / "run"
    run = ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out)]
    assert main([*run, "--model", name, *SIZES, *options]) == 0
    assert "rows computed by each layer" in capsys.readouterr().out
    model = ak.load(out)
    assert type(model) is kind
    found = json.loads((out / "report.json").read_text())
    assert found["config"]["model_name"] == name and found["max_abs_logit_difference"] < 1e-4
    assert found["images_that_read_differently"] == 0
    rows = found["rows_by_layer"]
    assert len(rows) == 3 and rows[0] == 30 * 5 and sorted(rows, reverse=True) == rows
    assert found["rows"]["elastic"] == sum(rows) <= found["rows"]["padded"] == 3 * rows[0]
    with open(out / "metrics.csv", newline="") as stream:
        metrics = list(csv.DictReader(stream))
    assert float(metrics[-1]["mean_rows"]) == pytest.approx(sum(rows) / 30)
    assert "mean_tape_length" not in metrics[0]
    for picture in ("rows_alive", "costs"):
        assert (out / f"{picture}.png").stat().st_size > 5000
    assert {file.stem for file in out.glob("*.png")} <= {*PICTURES}
    if name == "vit":
        assert rows[-1] == rows[0]
    else:
        image = tmp_path / "digit.png"
        Image.new("L", (28, 28), 200).save(image)
        capsys.readouterr()
        assert main(["predict", str(out), str(image)]) == 0
        assert re.search(r" \((5|[1-9]\d) rows, ", capsys.readouterr().out)
    # A run that has not finished loads as its model too, and goes on.
    (out / "model.safetensors").unlink()
    again = ak.load(out)
    assert type(again) is kind and again.config == model.config
    reported = []
    monkeypatch.setattr(recipe, "write_report", lambda *given, **options: reported.append(given[1]))
    assert main(["train", "--out", str(out), "--resume", "--model", name]) == 0
    assert type(reported[0]) is kind
    assert main(["train", "--out", str(out), "--resume", "--model", "adatape"]) == 2
    assert f"model: expected {name}, as in" in capsys.readouterr().err


def test_the_loss_of_a_halting_model_trains_its_halting(mnist):
    """A ponder loss with a large weight makes images halt earlier within an epoch."""
    data = load("mnist", mnist)
    steps = {}
    for weight in (0.0, 30.0):
        options = {"patch": 14, "dim": 16, "depth": 6, "heads": 2, "ffn": 16, "lr": 0.01}
        options |= {"data": "mnist", "model_name": "uvit", "epochs": 2, "batch": 10}
        config = TrainConfig.of({**options, "ponder_weight": weight})
        torch.manual_seed(0)
        model = config.model(10, 1)
        normalise = Normaliser.of(data.train_images)
        recipe.train(model, data, config.plan(), normalise, config.augmentation())
        output = predict(model, data.test_images, normalise)
        steps[weight] = output.halted.steps.double().mean().item()
    assert steps[30.0] < steps[0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_name": "bert"}, ("model", "avit", "list_models()", "'bert'")),
        ({"model_name": "transformer_tiny"}, ("model", "of images", "'transformer_tiny'")),
        ({"model_name": 3}, ("model", "3")),
        ({"model_name": "vit", "topk": 4}, ("topk", "none for the model vit", "4")),
        ({"model_name": "vit", "ponder_weight": 1.0}, ("ponder-weight", "none", "vit")),
        ({"model_name": "adatape", "gate_scale": 1.0}, ("gate-scale", "none", "adatape")),
        ({"model_name": "avit", "act_level": "row"}, ("act-level", "none", "avit")),
        ({"model_name": "uvit", "act_epsilon": 1.5}, ("act-epsilon", "below 1", "1.5")),
        ({"model_name": "uvit", "act_level": "token"}, ("act-level", "example", "'token'")),
        ({"model_name": "uvit", "distinct_layers": -1}, ("distinct-layers", "0", "-1")),
        ({"model_name": "avit_tiny_patch16_224", "variant": "S/7"}, ("variant", "none", "S/7")),
        ({"model_name": "avit_tiny_patch16_224"}, ("patch", "28", "16")),
    ],
)
def test_what_a_model_does_not_take_is_one_line(options, words):
    with refused(*words):
        TrainConfig.of({"data": "mnist", **options})


def test_names_decide_sizes_and_banks():
    name = "adatape_tiny_patch16_224.learn"
    config = TrainConfig.of({"data": "mnist", "model_name": name, "patch": 7})
    assert config.bank == "learn" and config.model(10, 1).config.dim == 192
    config = TrainConfig.of({"data": "cifar10", "model_name": "u2t", "ponder_weight": 0.5})
    made = config.model(10, 3)
    assert len(made.encoder.layers) == 2 and made.config.ponder_weight == 0.5
    assert TrainConfig.of({"data": "mnist", "model_name": "avit"}).activation == "gelu"


def test_runs_from_before_there_were_other_models_are_adatapes():
    saved = vars(TrainConfig.of({"data": "mnist"}))
    added = ("model_name", "act_epsilon", "act_level", "leave", "distinct_layers")
    added += ("gate_scale", "gate_center", "ponder_weight", "distribution_weight")
    older = {name: value for name, value in saved.items() if name not in added}
    assert TrainConfig.of_saved(older) == TrainConfig.of({"data": "mnist"})
    assert TrainConfig.of_saved(with_present_names(older)).reads


def test_outputs_of_batches_are_joined():
    def output(examples, rows_per_step):
        steps = torch.full((examples,), len(rows_per_step), dtype=torch.int32)
        halted = HaltedUnits(steps, torch.zeros(examples), torch.ones(3), rows_per_step)
        zeros = torch.zeros(examples, 1)
        return AdaTapeOutput(zeros, steps, zeros, (), halted)

    found = joined([output(2, (10, 5)), output(3, (15, 15, 5))])
    assert len(found) == 5 and found.halted.rows_per_step == (25, 20, 5)
    assert found.halted.steps.tolist() == [2, 2, 3, 3, 3] and found.halted.means is None
