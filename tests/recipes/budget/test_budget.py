"""The command `budget` on a run of the digits: its numbers by other means, and what it refuses."""

import json

import pytest
from tiny_training import exit_code

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes.budget import budget
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.training.train_loop import accuracy, predict


def test_each_line_is_a_model_that_was_loaded_with_these_limits(run, tmp_path, capsys):
    limits = ["--thresholds", "1.5,0.5", "--max-tape", "4,1", "--rounds", "1"]
    assert main(["budget", str(run), *limits, "--out", str(tmp_path / "b")]) == 0
    assert "images/s" in capsys.readouterr().out
    assert (tmp_path / "b" / "budget.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    found = [(r["halt_threshold"], r["num_tape_tokens"]) for r in report["results"]]
    assert found == [(0.5, 1), (1.5, 1), (0.5, 4), (1.5, 4)]
    data = images_of_run(run)
    for result in report["results"]:
        given = {name: result[name] for name in ("halt_threshold", "num_tape_tokens")}
        model = ak.load(run, **given)
        output = predict(model, data.test_images, normaliser_of(model))
        assert result["accuracy"] == accuracy(output, data.test_labels)
        assert result["mean_tape_tokens"] == output.tape_lens.double().mean().item()
        assert result["mean_rows"] == pytest.approx(4 + result["mean_tape_tokens"])
    flops = [r["flops"] for r in report["results"]]
    assert flops[0] < flops[3] and flops[0] == flops[1]


def test_without_limits_the_models_own_are_measured(run, tmp_path):
    results = budget.run(run, tmp_path / "b", rounds=1)
    own = ak.load(run).config
    assert {r.num_tape_tokens for r in results} == {own.num_tape_tokens}
    assert own.halt_threshold in [r.halt_threshold for r in results] and len(results) == 7
    assert results[0].mean_tape_tokens == 0  # a threshold of 0 reads nothing
    tapes = [r.mean_tape_tokens for r in results]
    assert tapes == sorted(tapes)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--thresholds", "nan"], ["thresholds: expected a number"]),
        (["--thresholds", "inf"], ["thresholds: expected one or more finite numbers"]),
        (["--thresholds", "1,,2"], ["--thresholds"]),
        (["--max-tape", "-1"], ["max-tape: expected 0 to", "got -1"]),
        (["--max-tape", "1.5"], ["--max-tape"]),
        (["--rounds", "0"], ["rounds: expected 1 or more"]),
        (["--data-dir", "/nowhere"], ["data-dir: expected none for digits"]),
    ],
)
def test_refusals_are_one_line(run, tmp_path, capsys, arguments, words):
    out = tmp_path / "b"
    code = exit_code(["budget", str(run), *arguments, "--out", str(out)])
    line = capsys.readouterr().err.strip()
    assert code == 2 and len(line.splitlines()) == 1 and all(word in line for word in words)
    assert not out.exists()


def test_a_run_that_reads_nothing_is_refused(tmp_path, capsys):
    assert main(["budget", str(tmp_path / "none"), "--out", str(tmp_path / "b")]) == 2
    assert "which is not there" in capsys.readouterr().err
