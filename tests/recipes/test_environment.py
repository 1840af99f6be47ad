"""The commit that figures name is this repository's, or none."""

import subprocess
from pathlib import Path

import pytest

from adatape_kernels.recipes import machine

ROOT = Path(__file__).resolve().parents[2]


def test_a_clone_names_its_commit():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(machine._commit(ROOT))


def test_an_installation_does_not_name_the_clone_that_it_lies_in(tmp_path):
    installed = tmp_path / "venv"
    installed.mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert machine._commit(installed) is None
    assert machine._commit(tmp_path) is None  # no commit yet


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine._commit(ROOT) is None
    assert machine.environment()["commit"] is None
