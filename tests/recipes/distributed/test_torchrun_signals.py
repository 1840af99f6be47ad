"""torchrun itself is asked to end: its ranks say in one line what is kept, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.run_folder import LOCK
from adatape_kernels.recipes.training import train

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="a run asks for it before it begins")

RUN = ["train", "--data", "digits", "--limit", "64", "--batch", "8", "--dim", "16", "--depth", "1"]
RUN += ["--heads", "2", "--ffn", "16"]
SECONDS_TO_BEGIN = 300


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_torchrun_that_is_asked_to_end_twice_keeps_what_is_written(tmp_path, monkeypatch):
    out, words = tmp_path / "run", tmp_path / "words.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "adatape_kernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    with words.open("wb") as stream:
        process = subprocess.Popen(
            [*torchrun, *RUN, "--epochs", "10000", "--out", str(out)],
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd=tmp_path,
        )
    try:
        until = time.monotonic() + SECONDS_TO_BEGIN
        while "epoch 2/10000" not in words.read_text():
            assert process.poll() is None and time.monotonic() < until, words.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    (line,) = [each for each in words.read_text().splitlines() if "interrupted" in each]
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
