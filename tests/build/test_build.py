import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import pytest
import torch

import adatape_kernels
from adatape_kernels._build import build_facts

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(build_facts()["compiled"] == "no", reason="no compiled part")


@pytest.fixture
def build(tmp_path):
    """Runs setup.py build_ext beside the repository; returns the process and the package built."""
    for name in ("CMakeLists.txt", "README.md", "csrc", "pyproject.toml", "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(mode, **environment):
        process = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "lib"],
            cwd=tmp_path,
            env={**os.environ, "ADATAPE_BUILD": mode, **environment},
            capture_output=True,
            text=True,
        )
        return process, tmp_path / "lib/adatape_kernels"

    return run


@pytest.fixture
def no_compiler(tmp_path):
    return {"PATH": str(tmp_path), "CXX": ""}


@compiled
def test_facts_of_the_compiled_part():
    facts = build_facts()
    assert list(facts) == [
        "compiled",
        "version",
        "torch",
        "compiler",
        "standard",
        "build_type",
        "cuda",
        "instruction_sets",
        "cpu_kernels",
    ]
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts["standard"] == "C++20"


def test_unknown_mode_is_one_line(build):
    process, _ = build("bogus")
    assert process.returncode != 0
    assert process.stderr == "error: ADATAPE_BUILD must be auto, require or python, not 'bogus'\n"


def test_auto_without_compiler_is_plain_python_and_says_why(build, no_compiler):
    process, package = build("auto", **no_compiler)
    why = "no C++ compiler was found (c++, g++, clang++)"
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"adatape-kernels: installed as plain Python, because {why}\n"
    assert [path.name for path in package.iterdir()] == ["_build_note.txt"]
    assert (package / "_build_note.txt").read_text() == f"{why}\n"


def test_require_without_compiler_fails(build, no_compiler):
    process, package = build("require", **no_compiler)
    assert process.returncode != 0
    assert process.stderr == (
        "error: ADATAPE_BUILD=require, but no C++ compiler was found (c++, g++, clang++)\n"
    )
    assert not package.exists()


@compiled
def test_torch_is_asked_for(build, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    process, _ = build("auto", PYTHONPATH=str(tmp_path))
    assert process.returncode != 0
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert "install torch" in process.stderr


@compiled
def test_failed_build_is_an_error_even_in_auto(build):
    process, _ = build("auto", CXX="false")
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1].startswith("error: the compiled part could not be built")


@pytest.fixture
def package_without_module(tmp_path, monkeypatch):
    """An empty folder in which `_C` is looked for instead of the package's own."""
    monkeypatch.setattr(adatape_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # without an editable install's finder
    monkeypatch.delitem(sys.modules, "adatape_kernels._C", raising=False)
    return tmp_path


def test_broken_module_is_reported(package_without_module):
    broken = package_without_module / ("_C" + EXTENSION_SUFFIXES[0])
    broken.write_text("not a shared library")
    facts = build_facts()
    assert facts["compiled"] == "no"
    assert facts["why"].startswith("ImportError: ") and "\n" not in facts["why"]


@pytest.mark.parametrize("note", ["no C++ compiler was found", None])
def test_absent_module_is_explained(package_without_module, monkeypatch, note):
    monkeypatch.setattr("adatape_kernels._build.__file__", str(package_without_module / "x.py"))
    if note:
        (package_without_module / "_build_note.txt").write_text(f"{note}\n")
    facts = build_facts()
    assert facts == {"compiled": "no", "why": note or facts["why"]}
    assert "\n" not in facts["why"]
