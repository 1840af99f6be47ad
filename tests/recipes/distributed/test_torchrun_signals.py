"""torchrun itself is asked to end, or starts its ranks anew: the run goes on from what is kept."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked_python
import pytest
import torch
import torch.distributed as dist

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.run_folder import LOCK
from adatape_kernels.recipes.training import train

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="a run asks for it before it begins")

RUN = ["train", "--data", "digits", "--limit", "64", "--batch", "8", "--dim", "16", "--depth", "1"]
RUN += ["--heads", "2", "--ffn", "16"]
EPOCHS = 3
SECONDS_TO_BEGIN = 300


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@contextlib.contextmanager
def torchrun(words, *options):
    """Have torchrun begin two ranks, which write what they say into a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "adatape_kernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    with words.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *RUN, *options],
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd=words.parent,
        )
    try:
        yield process
    finally:
        process.kill()


def wait_for(text, words, process):
    """Wait until a rank has said it."""
    until = time.monotonic() + SECONDS_TO_BEGIN
    while text not in words.read_text():
        assert process.poll() is None and time.monotonic() < until, words.read_text()
        time.sleep(0.01)


def said(words):
    """The lines of all ranks; each begins with the command's name, whoever else has written."""
    text = words.read_text()
    assert "KeyboardInterrupt" not in text, text
    return [line for line in text.splitlines() if "adatape-kernels: " in line]


@needs_gloo
def test_torchrun_that_is_asked_to_end_twice_keeps_what_is_written(tmp_path, monkeypatch):
    out, words = tmp_path / "run", tmp_path / "words.txt"
    with torchrun(words, "--epochs", "10000", "--out", str(out)) as process:
        wait_for("epoch 2/10000", words, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS_TO_BEGIN) != 0
    (line,) = said(words)
    held = checkpoint.load(out)
    assert held.epoch >= 2
    assert line.endswith(
        f"adatape-kernels: interrupted: {out} holds epoch {held.epoch} of 10000; --resume goes on "
        "from there"
    )
    assert not (out / LOCK).exists() and not [*out.glob("*.part")]

    monkeypatch.setattr(train, "write_report", lambda *given, **named: None)
    more = str(held.epoch + 1)
    assert main([*RUN, "--epochs", more, "--resume", "--out", str(out)]) == 0
    again = checkpoint.load(out)
    assert again.epoch == held.epoch + 1 and again.history[:-1] == held.history


@needs_gloo
def test_torchrun_begins_divided_parameters_anew_from_the_last_checkpoint(tmp_path, monkeypatch):
    """A rank is killed in the midst of an epoch; the curve is that of one process."""
    out, words = tmp_path / "run", tmp_path / "words.txt"
    options = ["--epochs", str(EPOCHS), "--ema", "0.9", "--mixup", "0.2"]
    program = [Path(__file__).with_name("torchrun_forked.py"), *RUN, *options]
    with words.open("wb") as stream:
        done = forked_python.run(
            [*program, "--parallel", "fsdp", "--out", out],
            stdout=stream,
            stderr=stream,
            cwd=tmp_path,
            timeout=SECONDS_TO_BEGIN,
        )
    assert done.returncode == 0, words.read_text()
    (line,) = said(words)
    # The other rank finds that one is gone, or torchrun has found it and tells that rank to end: on
    # a busy machine either may come first.
    assert re.search(
        r"rank 0 of 2: expected an answer of every other rank, and one is gone; --resume goes on "
        rf"from the last checkpoint$|interrupted: {re.escape(str(out))} holds epoch 1 of {EPOCHS}; "
        "--resume goes on from there$",
        line,
    ), line
    epochs = re.findall(rf"epoch (\d+)/{EPOCHS}", words.read_text())
    assert epochs == [str(number) for number in range(1, EPOCHS + 1)]
    assert not (out / LOCK).exists() and (out / "report.json").exists()

    monkeypatch.setattr(train, "write_report", lambda *given, **named: None)
    assert main([*RUN, *options, "--out", str(tmp_path / "one")]) == 0
    again, whole = (checkpoint.load(folder) for folder in (out, tmp_path / "one"))
    assert again.environment["parallel"] == "fsdp"
    assert [row["epoch"] for row in again.history] == [row["epoch"] for row in whole.history]
    names = "train_loss", "test_accuracy", "mean_tape_length"
    ours, theirs = (
        [[row[name] for name in names] for row in run.history] for run in (again, whole)
    )
    # An image of 360 may be on the other side of a limit by rounding.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=4e-3, rtol=0)
