"""A failed write leaves neither its part nor the lock; a lock that nobody holds stops nobody."""

import errno
import os

import pytest
import torch

from adatape_kernels.recipes import checkpoint, run_folder
from adatape_kernels.recipes.checkpoint import INDEX, Checkpoint
from adatape_kernels.recipes.run_folder import LOCK, claim

pytest.importorskip("safetensors", reason="checkpoints are such files")


def of(epoch):
    rows = [{"epoch": number + 1} for number in range(epoch)]
    return Checkpoint(epoch, epoch, {}, {}, rows, {}, {"weight": torch.full((20,), float(epoch))})


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("file", ["weights", "index", "metrics"])
def test_a_failed_write_leaves_no_lock_behind(tmp_path, monkeypatch, file):
    """Nor what it had begun, whichever file it was; the checkpoint before it stays."""
    with claim(tmp_path) as run:
        checkpoint.save(run, of(1))
    names_before, opened = names(tmp_path), type(tmp_path).open
    begins = {"weights": "checkpoint-2", "index": INDEX, "metrics": "metrics.csv"}[file]

    def full(path, *mode):
        if path.name.startswith(begins):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *mode)

    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(OSError, match="No space left"), claim(tmp_path) as run:
        if file == "metrics":
            run.write("metrics.csv", b"epoch")
        checkpoint.save(run, of(2))
    monkeypatch.undo()
    assert names(tmp_path) == names_before and LOCK not in names_before
    assert checkpoint.load(tmp_path).epoch == 1


def test_a_lock_file_of_a_process_number_that_is_in_use_holds_nobody_up(tmp_path):
    """It is the system's lock that counts, and not who is said to hold it."""
    (tmp_path / LOCK).write_bytes(run_folder._FIRST_LINE + f"process {os.getpid()}\n".encode())
    with claim(tmp_path) as run:
        run.write("metrics.csv", b"epoch")
    assert names(tmp_path) == {"metrics.csv"}
