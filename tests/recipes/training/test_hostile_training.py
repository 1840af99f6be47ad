"""What no run may do: keep numbers that are none, or quietly compute otherwise than was asked."""

import json

import pytest
import torch
from checks import refused

from adatape_kernels.cli import main
from adatape_kernels.data import augment
from adatape_kernels.data.mixup import Mixture
from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.finetune import finetune
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import accuracy

TINY = {"data": "digits", "dim": 8, "depth": 1, "heads": 2, "ffn": 8, "num_tape_tokens": 2}
TINY |= {"topk": 2, "limit": 20, "batch": 20}
STEPS = ("accumulate", "checkpoint_layers", "compiled")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(pictures, "draw_all", lambda *given: None)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_that_ends_in_nan_leaves_the_checkpoint_before(tmp_path, epochs, ema):
    """The only step of an epoch breaks the parameters, behind the loss that it reports."""
    out = tmp_path / "run"
    options = {**TINY, "epochs": epochs, "lr": 1e38, "max_grad_norm": 0.0, "ema": ema}
    with pytest.raises(RuntimeError) as stop:
        train.run(out, options)
    assert str(stop.value).startswith("logits: expected finite values after epoch 1, got ")
    kept = checkpoint.load(out)
    assert kept.epoch == 0 and all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_has_no_accuracy(wrong):
    logits = torch.zeros(3, 2)
    output = AdaTapeOutput(logits, torch.zeros(3, dtype=torch.int32), torch.zeros(3, 1), ())
    assert accuracy(output, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)
    logits[1, 1] = wrong
    with refused("logits", str(wrong), error=RuntimeError):
        accuracy(output, torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("alpha", [1e16, 1e300, 1.7e308])
def test_a_large_mixup_mixes_halves(alpha):
    shares = Mixture.draw(4, alpha, torch.Generator().manual_seed(0)).shares
    assert ((shares - 0.5).abs() < 1e-6).all()


def test_a_magnitude_without_randaugment_is_refused():
    of_recipe = {"data": "imagefolder", "recipe": "imagenet", "randaugment_magnitude": 3}
    found = TrainConfig.of(of_recipe)  # which has RandAugment
    assert (found.randaugment, found.randaugment_magnitude) == (2, 3)
    for options in ({**TINY, "randaugment_magnitude": 3}, of_recipe):
        with refused("randaugment-magnitude", "none without --randaugment", "got 3"):
            TrainConfig.of({**options, "randaugment": 0})


@pytest.mark.parametrize("decay", [-0.5, 1.0, 2.0, float("inf")])
def test_a_decay_out_of_range_says_below_which(decay):
    with refused("ema", "0 to below 1", f"got {decay}"):
        TrainConfig.of({**TINY, "ema": decay})


def steps_of(out):
    """How the steps of each run of a comparison were computed, by the run's name."""
    found = {}
    for file in sorted(out.glob(f"*/{checkpoint.INDEX}")):
        environment = json.loads(file.read_text())["environment"]
        found[file.parent.name] = tuple(environment[name] for name in STEPS)
    return found


def test_a_comparison_goes_on_as_it_was_computed(tmp_path, monkeypatch):
    """Runs that are begun after an interruption are computed as those before it."""
    out, calls, original = tmp_path / "comparison", [], augment.turn_and_move

    def turn_and_move(*given):
        calls.append(1)
        if len(calls) in (2, 4):  # in the second run, and in the third
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(augment, "turn_and_move", turn_and_move)
    monkeypatch.setattr(finetune, "report", lambda *given: pytest.fail("not interrupted"))
    asked = {"accumulate": 3, "checkpoint_layers": True}
    with pytest.raises(KeyboardInterrupt):
        finetune.run(out, {**TINY, "epochs": 1}, source_epochs=1, seeds=1, execution=asked)
    assert steps_of(out) == dict.fromkeys(("source", "plain-0"), (3, True, False))
    assert main(["finetune", "--out", str(out), "--resume", "--accumulate", "2"]) == 130
    expected = {"source": 3, "plain-0": 2, "input-0": 2}
    assert steps_of(out) == {name: (parts, True, False) for name, parts in expected.items()}
    plan = json.loads((out / finetune.PLAN).read_text())
    assert plan["execution"] == {"accumulate": 2, "checkpoint_layers": True}
    del plan["execution"]  # as in a folder of an earlier version
    (out / finetune.PLAN).write_text(json.dumps(plan))
    calls[:] = [1]
    assert main(["finetune", "--out", str(out), "--resume"]) == 130
    assert steps_of(out)["input-0"] == (2, True, False)


@pytest.mark.parametrize(
    ("altered", "words"),
    [
        (5, "execution: expected an object of Mapping, got 5"),
        ({"accumulate": 0}, "accumulate: expected 1 to "),
        ({"threads": 2}, "execution: expected accumulate, "),
        ({"compiled": "yes"}, "compile: expected True or False"),
    ],
)
def test_an_altered_plan_is_one_line(tmp_path, capsys, altered, words):
    plan = {"options": {**TINY, "epochs": 1}, "data_dir": None, "source": None, "seeds": 1}
    plan |= {"source_epochs": 1, "execution": altered}
    (tmp_path / finetune.PLAN).write_text(json.dumps(plan))
    assert main(["finetune", "--out", str(tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert words in error and finetune.PLAN in error and error.count("\n") == 1


def test_a_comparison_is_checked_whole_before_anything_is_written(tmp_path, monkeypatch):
    out, options = tmp_path / "comparison", {**TINY, "epochs": 1}
    drawn = {**options, "halt_threshold_range": (1.0, 3.0)}
    with refused("compile", "no halt-threshold-range"):
        finetune.run(out, drawn, seeds=1, execution={"compiled": True})
    monkeypatch.setattr("adatape_kernels.data.rand_augment.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^randaugment: expected kornia to be installed"):
        finetune.run(out, {**options, "randaugment": 1}, seeds=1)
    assert not out.exists()
