"""Training with halting thresholds that are drawn: what is drawn, repeated, saved and refused."""

import dataclasses
import json

import pytest
import torch
from tiny_training import exit_code

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser
from adatape_kernels.data import load as load_images
from adatape_kernels.recipes.checkpoint import load
from adatape_kernels.recipes.finetune import finetune
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.training import train as train_recipe
from adatape_kernels.recipes.training import train_loop
from adatape_kernels.recipes.training.drawn_thresholds import as_threshold_range, limits_of_steps
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import accuracy, predict, train

TRAIN = ["train", "--data", "digits", "--limit", "48", "--depth", "1", "--dim", "16", "--heads"]
TRAIN += ["2", "--ffn", "16", "--seed", "3", "--halt-threshold-range=-0.5,4", "--epochs", "2"]
TRAIN += ["--halt-threshold", "1.5"]
SMALL = dict(data="digits", limit=48, depth=1, dim=16, heads=2, ffn=16, batch=16, epochs=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs that nothing has broken."""
    out = tmp_path_factory.mktemp("drawn") / "whole"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def test_thresholds_depend_on_seed_and_epoch_and_fill_the_range():
    drawn = [
        [limits["halt_threshold"] for limits in limits_of_steps((-1.0, 4.0), seed, epoch, 2000)]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3
    values = torch.tensor(drawn[0], dtype=torch.float64)
    assert -1 <= values.min() < -0.98 and 3.98 < values.max() < 4
    counts = values.histc(5, -1, 4)  # 400 ± 18 each, were they uniform
    assert (counts - 400).abs().max() < 90
    assert limits_of_steps(None, 0, 0, 3) == [{}, {}, {}]


def test_each_step_calls_the_model_with_its_own_threshold(monkeypatch):
    """Images, their order and their augmentation are those of a run without a range."""
    data = load_images("digits").limited(48, 0)
    calls = {}
    for name, limits in (("one", None), ("drawn", (0.5, 4.0))):
        config = TrainConfig.of({**SMALL, "halt_threshold_range": limits})
        torch.manual_seed(0)
        model, called = config.model(data.num_classes, 1), []
        forward = model.forward

        def recorded(images, called=called, forward=forward, **given):
            called.append((images, given))
            return forward(images, **given)

        monkeypatch.setattr(model, "forward", recorded)
        train(
            model,
            data,
            config.plan(),
            Normaliser.of(data.train_images),
            config.augmentation(),
        )
        calls[name] = called
    assert [given for _, given in calls["one"]] == 6 * [{}]
    expected = [step for epoch in (0, 1) for step in limits_of_steps((0.5, 4.0), 0, epoch, 3)]
    assert [given for _, given in calls["drawn"]] == expected
    for (first, _), (second, _) in zip(*calls.values(), strict=True):
        assert torch.equal(first, second)


def test_a_resumed_run_repeats_an_unbroken_one(whole, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    epoch_of, calls = train_loop._train_epoch, []

    def stops_in_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "_train_epoch", stops_in_the_second)
        assert main([*TRAIN, "--out", str(broken)]) == 130
    saved = load(broken)
    assert saved.epoch == 1 and saved.config["halt_threshold_range"] == [-0.5, 4.0]
    monkeypatch.setattr(train_recipe, "write_report", lambda *_, **__: None)
    assert main(["train", "--resume", "--halt-threshold-range=-0.5,4", "--out", str(broken)]) == 0
    first, second = load(whole), load(broken)
    assert second.epoch == 2 and first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_evaluation_takes_the_threshold_that_is_named(whole):
    model, data = ak.load(whole), images_of_run(whole)
    assert model.config.halt_threshold == 1.5
    output = predict(model, data.test_images, normaliser_of(model))
    report = json.loads((whole / "report.json").read_text())
    assert report["test_accuracy"] == accuracy(output, data.test_labels)
    assert report["config"]["halt_threshold_range"] == [-0.5, 4.0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--halt-threshold-range", "1"], "halt-threshold-range: expected two finite numbers"),
        (["--halt-threshold-range", "3,1"], "the lower one first, got (3.0, 1.0)"),
        (["--halt-threshold-range", "2,2"], "the lower one first"),
        (["--halt-threshold-range", "1,inf"], "expected two finite numbers"),
        (["--halt-threshold-range", "nan,1"], "halt-threshold-range: expected a number"),
        (["--halt-threshold-range", "1,2,3"], "expected two finite numbers"),
        (["--halt-threshold-range", "4,8"], "halt-threshold: expected 4 to 8, the range that"),
        (["--halt-threshold-range", "1,x"], "--halt-threshold-range: expected numbers"),
        (["--halt-threshold-range", "1,3", "--model", "vit"], "expected none for the model vit"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, arguments, words):
    out = tmp_path / "run"
    code = exit_code(["train", "--data", "digits", *arguments, "--out", str(out)])
    line = capsys.readouterr().err.strip()
    assert code == 2 and len(line.splitlines()) == 1 and words in line
    assert not out.exists()


def test_a_run_keeps_its_range(whole, capsys):
    other = ["train", "--resume", "--halt-threshold-range", "1,3", "--out", str(whole)]
    assert main(other) == 2
    assert "halt-threshold-range: expected (-0.5, 4.0), as in" in capsys.readouterr().err


def test_a_run_that_was_saved_without_the_option_goes_on_at_one_threshold():
    config = dataclasses.asdict(TrainConfig.of(SMALL))
    del config["halt_threshold_range"]
    assert TrainConfig.of_saved(config).halt_threshold_range is None


def test_pairs_of_numbers_alone_are_a_range():
    assert as_threshold_range("range", [1, 2.5]) == (1.0, 2.5)
    for wrong in (None, "12", [True, 2], [1, None], {1: 2, 3: 4}, [[1, 2]], 3.0):
        with pytest.raises(ValueError, match=r"^range: expected"):
            as_threshold_range("range", wrong)


def test_a_comparison_keeps_its_range(tmp_path):
    plan = dict(data_dir=None, source=None, source_epochs=1, seeds=1)
    options = dict(data="digits", halt_threshold_range=(0.5, 4.0))
    (tmp_path / finetune.PLAN).write_text(json.dumps({**plan, "options": options}))
    given = {**plan, "options": options, "execution": {}, "loading": {}}
    assert finetune.saved_plan(tmp_path, given).options["halt_threshold_range"] == [0.5, 4.0]
    given["options"] = {"halt_threshold_range": (0.5, 5.0)}
    with pytest.raises(ValueError, match=r"^halt-threshold-range: expected .0.5, 4.0., as in"):
        finetune.saved_plan(tmp_path, given)
