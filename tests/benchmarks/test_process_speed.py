"""How the speed of two processes is measured beside one's, and that the guide has the record."""

import json
from pathlib import Path

import pytest

from adatape_kernels.benchmarks.dealing import process_speed
from adatape_kernels.benchmarks.dealing.process_speed import KINDS, TimedStep, images_per_second

TINY = ("--data", "digits", "--limit", "48", "--batches", "16")
GUIDE = Path(__file__).parents[2] / "docs/guides/several-processes.md"


def test_steps_are_measured_in_one_process_and_in_two(tmp_path, capfd):
    file = tmp_path / "speed.json"
    assert process_speed.main([*TINY, "--rounds", "2", "--write", str(file)]) == 0
    found = json.loads(file.read_text())
    assert json.loads(capfd.readouterr().out) == found
    assert found["processes"] == 2
    (batch,) = found["batches"]
    assert batch["batch"] == 16
    for kind in KINDS:
        assert len(batch[kind]) == 2 and min(batch[kind]) > 0
    assert batch["medians"].keys() == batch["ratios"].keys() == {*KINDS[1:]}
    # Who waits for the slowest in each step is no faster than who does not.
    assert batch["medians"]["in_step"] <= batch["medians"]["apart"]
    assert found["environment"]["machine"].endswith(" 1 threads")


def test_steps_that_wait_for_each_other_take_as_long_as_the_slowest():
    steps = [[TimedStep(4, 1.0), TimedStep(2, 0.5)], [TimedStep(4, 3.0), TimedStep(2, 0.25)]]
    assert images_per_second(steps) == 6 / 1.5 + 6 / 3.25
    assert images_per_second(steps, in_step=True) == 12 / 3.5


def test_a_process_that_fails_is_named(tmp_path, capfd):
    file = tmp_path / "speed.json"
    failing = ["--data", "digits", "--limit", "1000000", "--rounds", "1", "--write", str(file)]
    assert process_speed.main(failing) == 1
    error = capfd.readouterr().err
    assert "limit: expected 1 to 1437 training images, got 1000000" in error
    assert "process_speed: a process ended with code" in error
    assert not file.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--processes", "1"],
        ["--rounds", "0"],
        ["--batches", "x"],
        ["--batches", "127"],
        ["--batches", "0"],
        ["--limit", "300"],
    ],
)
def test_options_that_measure_nothing(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        process_speed.main(wrong)
    assert "expected" in capsys.readouterr().err


def test_the_guide_has_the_record():
    record = json.loads(process_speed.RESULT.read_text(encoding="utf-8"))
    assert record["processes"] == 2
    guide = GUIDE.read_text(encoding="utf-8")
    assert f" {record['images']:,} images" in guide
    for each in record["batches"]:
        one = sorted(each["one"])
        row = [each["batch"], f"{one[len(one) // 2]:,}"]
        for kind in KINDS[1:]:
            ratios = each["ratios"][kind]
            row.append(f"{each['medians'][kind]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        assert f"| {' | '.join(map(str, row))} |" in guide
