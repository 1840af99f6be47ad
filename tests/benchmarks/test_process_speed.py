"""How the speed of two processes is measured beside one's, and that the guide has the record."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_python import run

from adatape_kernels.benchmarks.dealing import process_speed


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """What starts a run or torchrun is forked; torchrun starts its ranks as ever."""

    def run_python(command, *, check, stdout, env):
        assert command[0] == sys.executable and check and stdout == subprocess.DEVNULL
        assert env["OMP_NUM_THREADS"] == "1"
        run(command[1:], stdout=stdout, env=env).check_returncode()

    starts = SimpleNamespace(**vars(subprocess) | {"run": run_python})
    monkeypatch.setattr(process_speed, "subprocess", starts)


TINY = ("--data", "digits", "--limit", "32", "--epochs", "1", "--dim", "16", "--depth", "1")
GUIDE = Path(__file__).parents[2] / "docs/guides/several-processes.md"


def test_runs_are_measured_in_one_process_and_in_two(tmp_path):
    file = tmp_path / "speed.json"
    command = ["--batches", "16", "--rounds", "1", "--write", str(file), "--", *TINY]
    assert process_speed.main([*command, "--heads", "2", "--ffn", "16"]) == 0
    found = json.loads(file.read_text())
    (batch,) = found["batches"]
    assert batch["batch"] == 16
    assert batch["ratios"] == [batch["ratio"]]
    assert batch["one"][0] > 0
    assert batch["several"][0] > 0
    assert found["environment"]["machine"].endswith(" 1 threads")


def test_a_run_that_fails_is_named(tmp_path, capfd):
    file = tmp_path / "speed.json"
    failing = ["--rounds", "1", "--write", str(file), "--", *TINY, "--heads", "3"]
    assert process_speed.main(failing) == 1
    assert "process_speed: Command" in capfd.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("wrong", [["--processes", "1"], ["--rounds", "0"], ["--batches", "x"]])
def test_options_that_measure_nothing(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        process_speed.main(wrong)
    assert "expected" in capsys.readouterr().err


def test_the_guide_has_the_record():
    record = json.loads(process_speed.RESULT.read_text(encoding="utf-8"))
    assert record["processes"] == 2
    guide = GUIDE.read_text(encoding="utf-8")
    for each in record["batches"]:
        one, several = (sorted(each[name]) for name in ("one", "several"))
        middle = len(one) // 2
        row = [each["batch"], f"{one[middle]:,}", f"{several[middle]:,}", f"{each['ratio']:.2f}"]
        spread = f"{min(each['ratios']):.2f} to {max(each['ratios']):.2f}"
        assert f"| {' | '.join(map(str, row))} ({spread}) |" in guide
