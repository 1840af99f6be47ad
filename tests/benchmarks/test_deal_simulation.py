"""How much idle time balanced dealing saves, by drawn and by recorded lengths."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adatape_kernels.benchmarks.audit.cards import CARDS
from adatape_kernels.benchmarks.dealing import rank_step_cost, recorded_lengths
from adatape_kernels.benchmarks.dealing.deal_simulation import (
    distribution,
    joint,
    main,
    simulated,
)
from adatape_kernels.benchmarks.dealing.rank_step_cost import StepCost
from adatape_kernels.benchmarks.reports import imagenet_cost
from adatape_kernels.benchmarks.reports.gpu_performance import COUNTED, counted_ops

pytestmark = pytest.mark.no_backend

ROWS = StepCost(own_rows=197, longest=50, row=1.0)


@pytest.mark.parametrize("ranks", [8, 32])
@pytest.mark.parametrize("lengths", ["skewed", "uniform"])
def test_dealing_by_rows_halves_the_idle_time(lengths, ranks):
    shares = distribution(lengths, 50)
    work = simulated(joint(shares, 0.0), ranks, 32, ROWS, steps=5)
    assert work.in_turn < work.balanced <= 1
    assert work.idle_left < 0.5
    changed = simulated(joint(shares, 1.0), ranks, 32, ROWS, steps=5)
    assert changed.balanced < work.balanced  # lengths that are forgotten are of no use


@pytest.mark.parametrize("changed", [0.0, 0.3, 1.0])
def test_images_that_are_drawn_anew_keep_the_distribution(changed):
    shares = distribution("skewed", 10)
    pairs = joint(shares, changed)
    np.testing.assert_allclose(pairs.sum(0), shares)
    np.testing.assert_allclose(pairs.sum(1), shares)
    assert np.trace(pairs) == pytest.approx(1 - changed * (1 - (shares**2).sum()))


def test_lengths_are_in_proportion_to_the_longest_tape():
    """All images read half of a tape of 2 in a run: that is 25 of 50 tokens."""
    pairs = np.zeros((3, 3))
    pairs[1, 1] = 1.0
    seen = []
    cost = SimpleNamespace(own_rows=5, longest=50, step=0.0)
    cost.images = lambda lengths: seen.append(set(lengths.tolist())) or lengths + 5.0
    assert simulated(pairs, 2, 3, cost, steps=1).in_turn == 1
    assert seen == [{25}]


def test_a_step_costs_what_imagenet_s_page_predicts_where_all_images_read_to_the_end():
    ops = counted_ops(COUNTED)
    h100 = next(card for card in CARDS if card.name == "H100")
    for variant in imagenet_cost.VARIANTS:
        cost = rank_step_cost.of_variant(variant)
        page = imagenet_cost.cost(variant, h100, ops, imagenet_cost.Recorded(1.0, 1.0))
        images = page.batch // imagenet_cost.GPUS
        longest = cost.images(np.full(images, cost.longest)).sum() + cost.step
        assert longest == pytest.approx(page.step, rel=1e-6)
        assert cost.images(np.array([0])) < cost.images(np.array([cost.longest]))


def test_the_guide_has_what_the_command_prints(capsys):
    """Of 8 ranks, whose lines take a moment."""
    guide = (Path(__file__).parents[2] / "docs/guides/several-processes.md").read_text()
    for options in ([], ["--recorded"]):
        assert main([*options, "--ranks", "8"]) == 0
        heads, rule, *lines = capsys.readouterr().out.splitlines()
        assert lines and all(line in guide for line in (f"{heads}\n{rule}", *lines))


def test_what_a_rank_s_images_cost():
    cost = StepCost(own_rows=2, longest=3, row=10.0, square=100.0, tape=1.0, image=0.5)
    assert cost.images(np.array([0, 3])).tolist() == [0.5 + 20 + 400, 0.5 + 3 + 50 + 2500]


def kept(epoch, rows, *, epochs=3, tape=2):
    """A checkpoint of a run on three images, whose model has four rows of its own."""
    tensors = {"rows of images": torch.tensor(rows, dtype=torch.int32)} if rows else {}
    tensors["model.position"] = torch.zeros(1, 4, 8)
    config = {"epochs": epochs, "num_tape_tokens": tape}
    return SimpleNamespace(
        epoch=epoch, config=config, tensors=tensors, data={"train_images": 3}, environment={}
    )


def test_epochs_that_follow_each_other_are_counted(tmp_path, capsys):
    run = [kept(1, [4, 5, 6]), kept(2, [4, 6, 6]), kept(4, [4, 4, 4]), kept(5, [4, 4, 5])]
    found = recorded_lengths.watched(iter(run))
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps(found))
    second, fifth = recorded_lengths.read(file)
    assert (second.epoch, fifth.epoch) == (2, 5)  # what epoch 3 read nobody saw
    assert second.counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert fifth.counts.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert second.changed == pytest.approx(1 / 3) and found["own_rows"] == 4
    assert main(["--recorded", str(file), "--ranks", "2,4", "--variant", "S/16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("| of epoch 5, 33% changed | 4 | ")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ([kept(1, [])], "one of several processes"),
        ([kept(1, [4, 4, 4])], "follow each other"),
        ([], "follow each other"),
    ],
)
def test_a_run_of_which_nothing_can_be_counted(run, words):
    with pytest.raises(ValueError, match=rf"^run: expected .*{words}"):
        recorded_lengths.watched(iter(run))


def test_a_run_is_watched_until_its_last_epoch(monkeypatch, tmp_path):
    seen = iter([ValueError("not yet"), kept(1, [4, 4, 4]), kept(1, [4, 4, 4]), kept(3, [4, 4, 4])])

    def load(folder):
        found = next(seen)
        if isinstance(found, ValueError):
            raise found
        return found

    monkeypatch.setattr(recorded_lengths.checkpoint, "load", load)
    found = recorded_lengths.checkpoints(tmp_path, wait=lambda seconds: None)
    assert [each.epoch for each in found] == [1, 3]


def test_a_run_that_never_begins_is_not_waited_for(tmp_path):
    waits = []
    assert list(recorded_lengths.checkpoints(tmp_path, patience=1.0, wait=waits.append)) == []
    assert 4 <= len(waits) <= 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"pairs": []}',
        '{"pairs": [{"epoch": 1, "counts": [[1, 2]]}]}',
        '{"pairs": [{"epoch": 1, "counts": [[0]]}]}',
        '{"pairs": [{"epoch": 1, "counts": [[-1, 2], [1, 1]]}]}',
    ],
)
def test_a_file_without_lengths_is_refused_in_one_line(tmp_path, content, capsys):
    file = tmp_path / "lengths.json"
    file.write_text(content)
    assert main(["--recorded", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"deal_simulation: {file}: expected the recorded lengths")
    assert main(["--recorded", str(tmp_path / "absent.json")]) == 2
