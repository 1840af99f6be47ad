"""Options of the loss and the regularisation: what a run with them trains, evaluates and keeps."""

import dataclasses
import importlib.util

import pytest
import torch
from checks import assert_same_bits, refused
from safetensors.torch import load_file
from tiny_training import assert_same_run, curve, exit_code

from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, load, rand_augment
from adatape_kernels.recipes import checkpoint, model_loading
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import accuracy, predict, train
from adatape_kernels.recipes.training.training_options import TRAINING_OPTIONS

TINY = {"data": "digits", "dim": 16, "depth": 1, "heads": 2, "ffn": 16, "batch": 16}
TINY |= {"num_tape_tokens": 3, "topk": 2, "limit": 72, "epochs": 3}
EVERY = {"loss": "sigmoid", "label_smoothing": 0.1, "mixup": 0.4, "random_erasing": 0.5}
EVERY |= {"ema": 0.9, "max_grad_norm": 0.5, "warmup_share": 0.3}
RANDOMLY = {"randaugment": 2, "randaugment_magnitude": 12}
kornia = pytest.mark.skipif(not importlib.util.find_spec("kornia"), reason="kornia is missing")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Writes the model alone, as the rest of a report takes seconds."""

    def write(out, model, *rest, **options):
        out.write("model.safetensors", recipe_bytes(model))

    monkeypatch.setattr(recipe, "write_report", write)


def recipe_bytes(model):
    from safetensors.torch import save

    return save({name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(
    "more", [pytest.param({}, id="own"), pytest.param(RANDOMLY, id="kornia", marks=kornia)]
)
def test_a_run_with_every_option_goes_on_bit_for_bit(tmp_path, monkeypatch, more):
    options = {**TINY, **EVERY, **more}
    recipe.run(tmp_path / "whole", options)
    original = checkpoint.save

    def save(run, saved):
        original(run, saved)
        if saved.epoch in (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    for start in (False, True):
        with pytest.raises(KeyboardInterrupt):
            recipe.run(tmp_path / "run", options if not start else {}, resume=start)
    monkeypatch.setattr(checkpoint, "save", original)
    torch.manual_seed(77)  # what the process has drawn before does not matter
    recipe.run(tmp_path / "run", {"ema": 0.9}, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    for name in other:
        assert_same_bits(one[name], other[name])
    assert len({row["train_loss"] for row in curve(tmp_path / "run")}) == 3


def test_the_average_is_what_is_evaluated_and_written(tmp_path):
    out, options = tmp_path / "run", {**TINY, "ema": 0.95, "lr": 0.02, "limit": 320, "epochs": 1}
    recipe.run(out, options)
    saved, written = checkpoint.load(out).tensors, load_file(out / "model.safetensors")
    assert saved["updates of averaged"] == 20
    differ = 0
    for name, tensor in written.items():
        assert_same_bits(tensor, saved[f"averaged.{name}"])
        differ += not torch.equal(tensor, saved[f"model.{name}"])
    assert differ > 5
    config = TrainConfig.of(options)
    data = load("digits", seed=config.split).limited(320, config.split)
    model = config.model(10, 1)
    shown = {}
    for kind in ("averaged.", "model."):
        weights = {name: saved[kind + name] for name in model.state_dict()}
        model.load_state_dict(weights)
        output = predict(model, data.test_images, Normaliser.of(data.train_images))
        shown[kind] = accuracy(output, data.test_labels)
    assert float(curve(out)[-1]["test_accuracy"]) == shown["averaged."] != shown["model."]
    # A run that has not finished is loaded as it is evaluated, too.
    (out / "model.safetensors").unlink()
    found = model_loading.load(out).state_dict()
    for name, tensor in written.items():
        assert_same_bits(found[name], tensor)


def test_the_average_is_a_literal_one():
    config = TrainConfig.of({**TINY, "epochs": 1})
    data = load("digits", seed=0).limited(72, 0)
    torch.manual_seed(0)
    model = config.model(10, 1)
    averaged = averaged_model(model, 0.6)
    expected, updates, original = {}, 0, averaged.update_parameters

    def update(present):
        nonlocal updates
        kept = min(0.6, (1 + updates) / (10 + updates)) if updates else 0.0
        for name, tensor in present.state_dict().items():
            before = expected.get(name, torch.zeros(()))
            expected[name] = kept * before + (1 - kept) * tensor.double()
        updates += 1
        original(present)

    averaged.update_parameters = update
    normalise = Normaliser.of(data.train_images)
    train(model, data, config.plan(), normalise, config.augmentation(), averaged=averaged)
    assert updates == 5
    for name, tensor in averaged.module.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_head_of_the_loss_sigmoid_begins_at_scenic_s_bias():
    for name in ("adatape", "vit", "uvit", "u2t", "avit"):
        options = {"data": "mnist", "model_name": name}
        bias = TrainConfig.of({**options, "loss": "sigmoid"}).model(10, 1).head.bias
        assert torch.equal(bias, torch.full((10,), -6.9))
        assert not TrainConfig.of(options).model(10, 1).head.bias.any()


def test_runs_from_before_these_options_go_on_as_they_were(tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    recipe.run(whole, TINY)
    assert not [name for name in checkpoint.load(whole).tensors if "averaged" in name]
    original = checkpoint.save

    def save(where, saved):
        config = {name: v for name, v in saved.config.items() if name not in TRAINING_OPTIONS}
        original(where, dataclasses.replace(saved, config=config))
        if saved.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(run, TINY)
    monkeypatch.setattr(checkpoint, "save", original)
    assert "loss" not in checkpoint.load(run).config
    recipe.run(run, {}, resume=True)
    assert_same_run(run, whole)


def test_a_resumed_run_keeps_its_options(tmp_path, capsys):
    out = tmp_path / "run"
    recipe.run(out, {**TINY, "ema": 0.9, "epochs": 1})
    words = ["train", "--out", str(out), "--resume"]
    assert main([*words, "--ema", "0.5"]) == 2
    assert "ema: expected 0.9, as in" in capsys.readouterr().err
    saved = checkpoint.load(out)
    for wrong in ("averaged.head.bias", "updates of averaged"):
        tensors = {name: tensor for name, tensor in saved.tensors.items() if name != wrong}
        checkpoint.save(out, dataclasses.replace(saved, tensors=tensors))
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and wrong.split(".")[-1][:7] in error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--loss", "focal"], ("loss: expected 'softmax' or 'sigmoid'", "'focal'")),
        (["--mixup", "-1"], ("mixup: expected 0 or more", "-1")),
        (["--mixup", "inf"], ("mixup: expected 0 or more", "inf")),
        (["--ema", "1"], ("ema: expected 0 to below 1", "1")),
        (["--label-smoothing", "2"], ("label-smoothing: expected 0 to 1", "2")),
        (["--warmup-share", "nan"], ("warmup-share: expected a number", "nan")),
        (["--max-grad-norm", "-2"], ("max-grad-norm: expected 0 or more", "-2")),
        (["--randaugment", "16"], ("randaugment: expected 0 to 15", "16")),
        (["--randaugment-magnitude", "30"], ("randaugment-magnitude: expected 1 to 29", "30")),
        (["--random-erasing", "1.5"], ("random-erasing: expected 0 to 1", "1.5")),
        (["--recipe", "large"], ("recipe: expected 'small' or 'imagenet'", "'large'")),
        (["--recipe", "small"], ("recipe: expected none for digits", "'small'")),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, words, parts):
    out = tmp_path / "run"
    assert exit_code(["train", "--data", "digits", "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    for part in parts:
        assert part in error


def test_kornia_is_missed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rand_augment, "find_spec", lambda name: None)
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--out", str(out), "--randaugment", "2"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'adatape-kernels[augment]'" in error and error.count("\n") == 1
    assert not out.exists()


def test_a_fine_tuning_takes_no_recipe(tmp_path, capsys):
    words = ["--out", str(tmp_path / "a"), "--data", "digits"]
    from adatape_kernels.recipes.finetune import finetune

    with refused("recipe", "none"):
        finetune.run(tmp_path / "a", {"data": "digits", "recipe": "small"})
    assert main(["finetune", *words, "--mixup", "-1"]) == 2
    assert "mixup: expected 0 or more" in capsys.readouterr().err
