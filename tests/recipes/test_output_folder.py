"""`--out` at places where no folder can be: one line that names it, and nothing is left behind."""

import os

import pytest

from adatape_kernels.cli import main

COMMANDS = {
    "demo": ["demo", "--epochs", "1"],
    "train": ["train", "--data", "digits", "--epochs", "1"],
    "resume": ["train", "--resume"],
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "out",
    [
        *("/proc/x", "/proc/self/x/y", "/dev/null", "/dev/null/x", "/sys/x", "file", "file/x"),
        *("loop", "loop/x", "broken", "pipe", "n" * 300, "new/" + "n" * 300, "x/" * 3000, "a\0b"),
    ],
    ids=lambda out: out[:16].replace("\0", "0"),
)
def test_a_place_without_a_folder_is_named_in_one_line(places, tmp_path, capsys, command, out):
    pytest.importorskip("matplotlib")
    if out.startswith(("/proc", "/sys", "/dev")) and not os.path.isdir("/proc/self"):
        pytest.skip("no such file system here")
    assert main([*COMMANDS[command], f"--out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    names = ("out", "resume") if command == "resume" else ("out",)
    assert line.startswith(tuple(f"adatape-kernels: {name}: expected " for name in names))
    assert len(line) < 400
    assert sorted(tmp_path.iterdir()) == places


@pytest.mark.parametrize("name", ["n" * 300, "loop", "loop/x", "a\0b", "pipe", "file/x"])
def test_a_data_dir_that_is_none_is_named_in_one_line(places, capsys, name):
    pytest.importorskip("matplotlib")
    command = ["train", "--data", "imagefolder", f"--data-dir={name}", "--out=new"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adatape-kernels: data-dir: expected a folder at ")
    assert not os.path.exists("new")
