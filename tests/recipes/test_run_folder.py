"""One process writes into the folder of a run, and nothing that is not a run's is touched."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
import torch
from checks import refused

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint, demo, run_folder
from adatape_kernels.recipes.checkpoint import INDEX, Checkpoint
from adatape_kernels.recipes.run_folder import LOCK, claim, leftovers
from adatape_kernels.recipes.training import train


def of(epoch):
    rows = [{"epoch": number + 1} for number in range(epoch)]
    return Checkpoint(epoch, epoch, {}, {}, rows, {}, {"weight": torch.full((20,), float(epoch))})


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    "words", [["demo", "--epochs", "1"], ["train", "--data", "digits"], ["train", "--resume"]]
)
def test_a_second_process_gets_one_line(tmp_path, capsys, words):
    if "--resume" in words:
        checkpoint.save(tmp_path, of(1))
    with claim(tmp_path):
        before = names(tmp_path)
        assert main([*words, "--out", str(tmp_path)]) == 2
        assert names(tmp_path) == before
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("adatape-kernels")]
    assert len(lines) == 1 and "Traceback" not in error
    assert f"out: expected a folder that no other process writes into, got {tmp_path}" in error
    assert f"process {os.getpid()} is at work" in error


@pytest.mark.parametrize("answer", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, answer):
    def flock(*arguments):
        raise OSError(getattr(errno, answer), os.strerror(getattr(errno, answer)))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim(tmp_path) as run:
        for epoch in (1, 2, 3):
            checkpoint.save(run, of(epoch))
    assert checkpoint.load(tmp_path).epoch == 3
    assert capsys.readouterr().err.count("file system without locks") == 1
    assert len(names(tmp_path)) == 2


def test_a_system_without_locks_can_import_and_write(tmp_path, monkeypatch, capsys):
    script = "import sys; sys.modules['fcntl'] = None\n"
    script += "import adatape_kernels.recipes.training.train, adatape_kernels.recipes.demo"
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == 0
    monkeypatch.setattr(run_folder, "fcntl", None)
    checkpoint.save(tmp_path, of(1))
    assert checkpoint.load(tmp_path).epoch == 1
    assert "without locks" in capsys.readouterr().err


OF_THE_USER = (
    "checkpoint-best.safetensors",
    "checkpoint-0.safetensors",
    "checkpoint-1.safetensors.bak",
    "checkpoint-2.safetensors",
    "checkpoint-3.safetensors.part",
    "checkpoint.json.part",
    "checkpoint.json.bak",
    "checkpoint-1-00000000.safetensors",
    "checkpoint-copy.json",
    "model.safetensors.part",
)


@pytest.mark.parametrize("locks", [True, False])
def test_what_others_wrote_stays(tmp_path, monkeypatch, locks):
    checkpoint.save(tmp_path, of(1))
    if not locks:
        monkeypatch.setattr(run_folder, "fcntl", None)
    for name in OF_THE_USER:
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        with claim(tmp_path) as run:
            checkpoint.remove_leftovers(run)
            first = checkpoint.load(tmp_path).epoch + 1
            for epoch in range(first, first + 3):
                checkpoint.save(run, of(epoch))
                assert checkpoint.load(tmp_path).epoch == epoch
    for name in OF_THE_USER:
        assert (tmp_path / name).read_text() == "mine"
    assert len(names(tmp_path)) == len(OF_THE_USER) + 2


def test_a_lock_file_names_only_what_runs_write(tmp_path):
    for name in ("notes.txt", "checkpoint-best.safetensors"):
        (tmp_path / name).write_text("mine")
    with claim(tmp_path) as run:
        run.note("notes.txt", "checkpoint-best.safetensors", "../x", "checkpoint-7.safetensors")
    (tmp_path / "checkpoint-7.safetensors").touch()
    assert leftovers(tmp_path) == {LOCK, "checkpoint-7.safetensors"}
    with claim(tmp_path) as run:
        checkpoint.remove_leftovers(run)
    assert names(tmp_path) == {"notes.txt", "checkpoint-best.safetensors"}


def test_an_altered_lock_file_names_nothing(tmp_path):
    with claim(tmp_path) as run:
        run.note("checkpoint-7.safetensors")
    whole = (tmp_path / LOCK).read_bytes().removesuffix(b"\n")
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1
        (tmp_path / LOCK).write_bytes(altered)
        assert leftovers(tmp_path) == {LOCK}
        try:
            with claim(tmp_path) as run:
                assert run.noted == []
                run.note("checkpoint-7.safetensors")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / LOCK}: expected"), error
            assert place < whole.index(b"\n") + 1
            (tmp_path / LOCK).unlink()


@pytest.mark.parametrize("kind", ["text", "link", "pipe", "folder"])
def test_a_lock_file_of_another_kind_is_named_and_kept(tmp_path, kind):
    (tmp_path / "letter").write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    if kind == "text":
        (out / LOCK).write_text("mine")
    elif kind == "link":
        (out / LOCK).symlink_to(tmp_path / "letter")
    elif kind == "pipe":
        os.mkfifo(out / LOCK)
    else:
        (out / LOCK).mkdir()
    with pytest.raises((ValueError, OSError)) as info, claim(out):
        pass
    assert str(out / LOCK) in str(info.value) and "\n" not in str(info.value)
    assert (tmp_path / "letter").read_text() == "mine" and os.path.lexists(out / LOCK)
    if kind == "text":
        assert (out / LOCK).read_text() == "mine"


def test_a_killed_start_does_not_block_the_next(tmp_path, monkeypatch, capsys):
    with claim(tmp_path) as run:
        run.note("checkpoint-0.safetensors")
    (tmp_path / "checkpoint-0.safetensors").write_bytes(b"half")
    assert LOCK in names(tmp_path)
    words = ["train", "--data", "digits", "--limit", "20", "--epochs", "1", "--dim", "16"]
    words += ["--depth", "1", "--ffn", "16", "--heads", "2"]
    monkeypatch.setattr(train, "write_report", lambda *given, **options: None)
    assert main([*words, "--out", str(tmp_path)]) == 0
    kept = {"checkpoint-1.safetensors", "best.safetensors", "metrics.csv", "config.yaml"}
    assert names(tmp_path) == {INDEX, *kept}


@pytest.mark.parametrize("value", [None, 5, 1.0, True, "", "a\0b", [], b"\0"])
def test_folders_are_paths(value):
    with refused("out"):
        demo.run(value, epochs=1)
    with refused("out"):
        train.run(value, {"data": "digits"})
