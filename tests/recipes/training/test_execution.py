"""How steps are computed: in parts, with layers computed twice, compiled, in bf16."""

import dataclasses
import functools
import json

import pytest
import torch
from checks import assert_same_bits
from torch import nn

from adatape_kernels.cli import main
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    UViT,
    UViTConfig,
    ViT,
    ViTConfig,
)
from adatape_kernels.recipes import checkpoint, model_comparison, pictures
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.parity import parity_table, parity_training
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_step import StepSums, StepTally, add_gradients

CPU = torch.device("cpu")
SIZES = dict(num_classes=10, dim=16, num_heads=2, ffn_dim=16, image_size=8, in_channels=1)
TAPE = dict(tape_ffn_dim=8, num_tape_tokens=3, topk=2)
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {"depth": 2, **TAPE, "bank_patch_size": 2}),
    "no tape": (
        AdaTapeViT,
        AdaTapeViTConfig,
        {"depth": 2, **TAPE, "bank_patch_size": 2, "halt_threshold": 0.0},
    ),
    "learn": (AdaTapeViT, AdaTapeViTConfig, {"depth": 2, **TAPE, "bank": "learn", "bank_size": 9}),
    "vit": (ViT, ViTConfig, {"depth": 2}),
    "uvit": (UViT, UViTConfig, {"depth": 4}),
    "avit": (AViT, AViTConfig, {"depth": 3, "gate_center": 4.0, "distribution_weight": 0.0}),
}
IMAGES, LABELS = torch.rand(7, 1, 8, 8), torch.arange(7)


def new_model(kind="adatape", **further):
    made, config, options = MODELS[kind]
    torch.manual_seed(0)
    model = made(config(patch_size=4, **SIZES, **{**options, **further}))
    nn.init.normal_(model.head.weight, std=0.1)  # a new head would send no gradient on
    return model.train()


def gradients(model, execution):
    """The gradients of a batch of seven, and what the step says."""
    with execution.forward_of(model) as forward:
        sums = add_gradients(forward, model.loss, IMAGES, LABELS, CPU, execution)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("parts", [3, 9])
@pytest.mark.parametrize("kind", MODELS)
def test_parts_of_a_batch_add_up_to_it(kind, parts):
    expected, whole = gradients(new_model(kind), Execution())
    found, sums = gradients(new_model(kind), Execution(accumulate=parts))
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * float(largest))
    assert abs(sums.loss - whole.loss) < 1e-6
    assert (sums.right, sums.work, sums.unit) == (whole.right, whole.work, whole.unit)


def test_targets_may_be_probabilities():
    """As mixed images have them: the right class is the most probable one."""
    model = new_model("vit")
    targets = nn.functional.one_hot(LABELS, 10).float() * 0.8 + 0.02
    sums = add_gradients(model, model.loss, IMAGES, targets, CPU, Execution(accumulate=2))
    assert sums.right == (model(IMAGES).logits.argmax(1) == LABELS).sum()


def test_losses_of_a_whole_batch_are_refused_in_parts():
    weighed = new_model("avit", distribution_weight=0.1)
    Execution().check_model(weighed)
    with pytest.raises(ValueError, match=r"^accumulate: expected 1 for an A-ViT, .*, got 2$"):
        Execution(accumulate=2).check_model(weighed)
    Execution(accumulate=2).check_model(new_model("avit"))
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"^accumulate: expected 1 with the batch norm 1, "):
        Execution(accumulate=2).check_model(normed)
    with pytest.raises(ValueError, match=r"^checkpoint-layers: expected a model with "):
        Execution(checkpoint_layers=True).check_model(normed)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_that_are_computed_twice_give_the_same_bits(kind):
    expected, _ = gradients(new_model(kind), Execution())
    model, calls = new_model(kind), []
    model.encoder.layers[0].register_forward_pre_hook(lambda *arguments: calls.append(1))
    found, _ = gradients(model, Execution(checkpoint_layers=True))
    for name, gradient in found.items():
        assert_same_bits(gradient, expected[name])
    assert len(calls) == 2 * (1 if kind != "uvit" else len(calls) // 2) and calls
    assert not model.grad_checkpointing


@pytest.mark.compiles
def test_a_compiled_step_is_the_step(monkeypatch, fresh_compiler):
    graphs, compiled = [], torch.compile

    def noted(graph, examples):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(compiled, backend=noted))
    expected, _ = gradients(new_model(depth=1), Execution())
    model = new_model(depth=1)
    Execution(compiled=True).try_step(model, IMAGES[:2])
    assert graphs and all(parameter.grad is None for parameter in model.parameters())
    tried = len(graphs)
    found, _ = gradients(model, Execution(compiled=True))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(graphs) == tried  # a batch of another size compiles nothing anew


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch):
    def compiler(model, **options):
        def fail(*arguments):
            raise RuntimeError("No working C++ compiler\n\nSet TORCHDYNAMO_VERBOSE=1")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    words = r"^compile: expected torch.compile to work here, got No working C\+\+ compiler$"
    with pytest.raises(RuntimeError, match=words):
        Execution(compiled=True).try_step(new_model(), IMAGES[:2])

    def absent(model, **options):
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", absent)
    with pytest.raises(RuntimeError, match=r"got torch.compile is not supported on Python 3.99\+$"):
        Execution(compiled=True).try_step(new_model(), IMAGES[:2])


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_is_float32_but_for_rounding(kind):
    """A step by autocast: the products are rounded, parameters and gradients float32."""
    expected, whole = gradients(new_model(kind), Execution())
    found, sums = gradients(new_model(kind), Execution("bf16"))
    assert sums.loss.dtype == torch.float32 and sums.loss != whole.loss
    assert abs(sums.loss - whole.loss) < 2e-2 * whole.loss
    assert found.keys() == expected.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'bf16', got 'float16'"),
        ({"accumulate": 0}, "accumulate: expected "),
        ({"accumulate": 1.5}, "accumulate: expected "),
        ({"checkpoint_layers": 2}, "checkpoint-layers: expected "),
        ({"compiled": "yes"}, "compile: expected "),
    ],
)
def test_other_values_are_refused(values, words):
    with pytest.raises(ValueError) as refusal:
        Execution(**values)
    assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)


def test_thresholds_that_are_drawn_are_not_compiled(tmp_path):
    Execution().check_thresholds((0.0, 1.0))
    options = {"data": "digits", "halt_threshold": 0.5, "halt_threshold_range": (0.0, 1.0)}
    with pytest.raises(ValueError, match=r"^compile: expected no halt-threshold-range beside it"):
        train.run(tmp_path / "run", options, execution={"compiled": True})
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_keeps_what_it_is_not_asked_to_change():
    saved = {"accumulate": 3, "compiled": True, "threads": 2}
    assert Execution.of_run("bf16", {}, saved) == Execution("bf16", 3, False, True)
    given = {"accumulate": None, "compiled": False, "checkpoint_layers": True}
    assert Execution.of_run("bf16", given, saved) == Execution("bf16", 3, True, False)
    with pytest.raises(ValueError, match=r"^execution: expected accumulate, .*, got 'threads'$"):
        Execution.of_run("bf16", {"threads": 1})


def test_runs_of_before_were_float32():
    config = TrainConfig.of({"data": "digits", "dtype": "bf16"})
    saved = dict(vars(config))
    assert TrainConfig.of_saved(saved).dtype == "bf16"
    del saved["dtype"]
    assert TrainConfig.of_saved(saved).dtype == "float32"
    with pytest.raises(ValueError, match=r"^dtype: expected 'float32' or 'bf16', got 'fp8'$"):
        ParityConfig(dtype="fp8")


def test_a_tally_names_the_step_whose_loss_is_not_finite():
    model = new_model("vit")
    _, sums = gradients(model, Execution())
    tally = StepTally(torch.device("cuda"), lambda step: f"at epoch 4, step {step}")
    tally.add(0, 7, sums)
    tally.add(1, 7, sums._replace(loss=torch.tensor(torch.inf)))
    assert tally.seen == 0  # a GPU is not waited for yet
    with pytest.raises(RuntimeError) as stop:
        tally.read()
    assert str(stop.value) == "loss: expected a finite value at epoch 4, step 1, got inf"
    assert tally.seen == 7 and tally.loss == pytest.approx(7 * sums.loss.item())


def test_a_tally_of_several_processes_waits_for_them_behind_the_step(monkeypatch):
    """Each of two has the half of a loss, and what both have together is there once it is asked."""
    waits = []

    def summing(ranks, tensor):
        assert ranks.count == 2
        return lambda: waits.append(len(tensor)) or 2 * tensor

    monkeypatch.setattr(Ranks, "summing", summing)
    half = StepSums(torch.tensor(0.75), torch.tensor(2), torch.tensor(9), "rows")
    tally = StepTally(CPU, lambda step: f"at step {step}", Ranks(0, 2))
    tally.add(0, 8, half)
    assert not waits and not tally.seen
    tally.take()
    tally.take()  # nothing is left
    assert waits == [1] and (tally.seen, tally.steps, tally.last_loss) == (8, 1, 1.5)

    # Nothing is lost where nobody has waited before the next is sent, or the end is there.
    tally.add(1, 8, half)
    tally.add(2, 4, half)
    assert tally.seen == 16
    tally.read()
    assert waits == [1, 1, 1] and (tally.seen, tally.steps) == (20, 3)
    assert (tally.loss, tally.right, tally.work) == (20 * 1.5, 12, 54)

    tally.add(3, 8, half._replace(loss=torch.tensor(torch.nan)))
    with pytest.raises(RuntimeError, match=r"^loss: expected a finite value at step 3, got nan$"):
        tally.take()


OPTIONS = ["train", "--data", "digits", "--limit", "40", "--batch", "16", "--dim", "16"]
OPTIONS += ["--depth", "1", "--heads", "2", "--ffn", "16", "--num-tape-tokens", "3", "--topk", "2"]
OPTIONS += ["--epochs", "1"]


def test_the_command_saves_and_reports_how_it_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "draw_all", lambda *arguments: None)
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(model_comparison, "COMPARED_IMAGES", 30)
    out = tmp_path / "run"
    more = ["--dtype", "bf16", "--accumulate", "2", "--checkpoint-layers", "--device", "cpu"]
    assert main([*OPTIONS, "--out", str(out), *more]) == 0
    assert "bf16 beside float32" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["dtype"] == report["dtype"] == "bf16"
    errors = report["errors"]
    assert 0 < errors["elastic"] < 0.1 and 0 < errors["padded"] < 0.1
    saved = checkpoint.load(out)
    assert saved.environment["accumulate"] == 2 and saved.environment["checkpoint_layers"]
    assert {t.dtype for name, t in saved.tensors.items() if "model." in name} == {torch.float32}
    # The whole run is there: only its report is written again.
    assert main(["train", "--out", str(out), "--resume", "--dtype", "float32"]) == 2
    assert "dtype: expected bf16, as in " in capsys.readouterr().err
    monkeypatch.setattr(train, "write_report", lambda *arguments, **options: None)
    resumed = ["train", "--out", str(out), "--resume", "--no-checkpoint-layers"]
    assert main([*resumed, "--accumulate", "0"]) == 2
    assert "accumulate: expected " in capsys.readouterr().err
    assert main(resumed) == 0
    error = capsys.readouterr().err
    assert "note: checkpoint_layers was True and is False" in error and "accumulate" not in error


def test_parity_in_bf16_is_another_table(tmp_path):
    config = ParityConfig(
        lengths=(4,), models=("adatape",), seeds=(0,), steps=2, batch=8, dtype="bf16"
    )
    model, result = parity_training.train(Run("adatape", 4, 0), config, lambda *step: None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    entries = {"training": config.training(4), "result": result.entries()}
    assert entries["training"]["dtype"] == "bf16"
    file = tmp_path / "adatape-4-0.json"
    file.write_text(json.dumps(entries))
    other = dataclasses.replace(config, dtype="float32")
    with pytest.raises(ValueError, match=r"^dtype: expected 'bf16', as in .*, got 'float32'$"):
        parity_table.run(tmp_path, other)
    del entries["training"]["dtype"]  # as of a run of before
    file.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"^dtype: expected 'float32', as in .*, got 'bf16'$"):
        parity_table.run(tmp_path, config)
