"""Installing where a tool is too old, or where kernels for GPUs alone cannot be built."""

import os
import pty
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from adatape_kernels._build import ASKED_FOR, build_facts

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(build_facts()["compiled"] == "no", reason="no compiled part")


@pytest.fixture
def build(tmp_path):
    """Runs setup.py build_ext beside the repository; returns the process and what was built."""
    names = ("CMakeLists.txt", "README.md", "benchmarks", "csrc", "pyproject.toml", "setup.py")
    for name in names:
        (tmp_path / name).symlink_to(ROOT / name)

    def run(**environment):
        process = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "lib"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        return process, tmp_path / "lib/adatape_kernels"

    return run


def tool(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def with_cmake(tmp_path):
    """Puts a script in the place of pip's CMake; returns the environment to run setup.py in."""

    def replace(script, python=""):
        folder = tmp_path / "bin"
        folder.mkdir()
        tool(folder, "cmake", script)
        (tmp_path / "sitecustomize.py").write_text(
            "import sysconfig\n"
            "get = sysconfig.get_path\n"
            f"sysconfig.get_path = lambda name, *rest: {str(folder)!r} if name == 'scripts' "
            f"else get(name, *rest)\n{python}"
        )
        return {"PYTHONPATH": str(tmp_path)}

    return replace


def test_an_old_cmake_is_named_with_what_helps(build, with_cmake):
    """Debian 12's, whose version is all that is asked of it."""
    old_cmake = with_cmake("echo cmake version 3.25.1")
    process, package = build(ADATAPE_BUILD="auto", **old_cmake)
    assert process.returncode == 0, process.stderr
    note = (package / "_build_note.txt").read_text()
    assert "CMake 3.25.2 or newer is needed" in note
    assert "is 3.25.1 (pip install cmake ninja)" in note and note.count("\n") == 1
    process, _ = build(ADATAPE_BUILD="require", **old_cmake)
    assert process.returncode != 0 and "CMake 3.25.2 or newer is needed" in process.stderr


@pytest.mark.parametrize("script", ["exit 1", "echo cmake", "exec nowhere"])
def test_a_cmake_that_does_not_run_is_named(build, with_cmake, script):
    process, package = build(ADATAPE_BUILD="auto", **with_cmake(script))
    assert process.returncode == 0, process.stderr
    note = (package / "_build_note.txt").read_text()
    assert note.endswith("bin/cmake does not run (pip install cmake ninja)\n")
    assert note.count("\n") == 1


def test_a_script_of_a_python_that_has_gone_does_not_run(build, with_cmake, tmp_path):
    environment = with_cmake("")
    (tmp_path / "bin/cmake").write_text("#!/nowhere/python\n")
    process, package = build(ADATAPE_BUILD="auto", **environment)
    assert process.returncode == 0, process.stderr
    assert "bin/cmake does not run" in (package / "_build_note.txt").read_text()


@pytest.mark.parametrize("mode", ["auto", "python"])
def test_kernels_for_gpus_are_required_where_nothing_can_be_compiled(build, with_cmake, mode):
    old_cmake = with_cmake("echo cmake version 3.25.1")
    process, _ = build(ADATAPE_BUILD=mode, ADATAPE_CUDA="require", **old_cmake)
    assert process.returncode != 0 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ADATAPE_CUDA=require, but ")


def test_an_old_setuptools_is_named(build, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import setuptools\nsetuptools.__version__ = '65.5.0.post1'\n"
    )
    process, _ = build(PYTHONPATH=str(tmp_path))
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1] == (
        "error: setuptools 77 or newer is needed, and this is 65.5.0.post1 "
        "(pip install 'setuptools>=77')"
    )


@pytest.mark.parametrize("variable", ["ADATAPE_BUILD", "ADATAPE_CUDA"])
def test_an_unknown_value_is_one_line(build, variable):
    process, _ = build(**{variable: "bogus"})
    assert process.returncode != 0 and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"error: {variable} must be auto, require or ")
    assert "not 'bogus'" in process.stderr


def facts_of(package):
    """What the module in a folder tells of itself, in a process that has no other."""
    script = (
        "import sys, importlib.util, torch; from pathlib import Path; "
        "path = next(Path(sys.argv[1]).glob('_C*.so')); "
        "spec = importlib.util.spec_from_file_location('_C', path); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(module.build_facts()['cuda'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, package], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


@compiled
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_kernels_for_gpus_can_be_required(build):
    process, package = build(ADATAPE_CUDA="require")
    assert process.returncode != 0 and not list(package.glob("_C*"))
    assert "ADATAPE_CUDA=require, but there is none: torch" in process.stderr


@pytest.fixture
def quick_compiler(tmp_path):
    """A C++ compiler that does not optimise, and keeps what it made for another build beside it."""
    kept = tmp_path / "kept"
    kept.mkdir()
    script = f"""
name={kept}/$(echo "$*" | cksum | tr " " _) out= rules= last= object=
for word in "$@"; do
  case "$last" in -o) out=$word ;; -MF) rules=$word ;; esac
  case "$word" in -c) object=yes ;; esac
  last=$word
done
if [ -z "$object" ]; then exec c++ "$@"; fi
if [ ! -e $name.o ]; then
  c++ "$@" -O0 || exit 1
  cp "$out" $name.o
  if [ -n "$rules" ]; then cp "$rules" $name.d; fi
fi
cp $name.o "$out"
if [ -n "$rules" ]; then cp $name.d "$rules"; fi"""
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    return str(tool(tmp_path, "c++", script.replace("c++ ", f"{real} ")))


@compiled
def test_kernels_for_gpus_are_left_out(build, with_cmake, quick_compiler):
    """Where they cannot be built: beside a torch with CUDA, by a CMake that fails at csrc/cuda.

    And where they are not wanted. A module replaces the note of an earlier installation.
    """
    real = Path(sysconfig.get_path("scripts"), "cmake")
    environment = with_cmake(
        f'for option in "$@"; do case "$option" in -DADATAPE_WITHOUT_CUDA=) exit 1; esac; done\n'
        f'exec {real} "$@"',
        "import pathlib\n"
        "read = pathlib.Path.read_text\n"
        "def read_text(path, *rest, **names):\n"
        "    with_cuda = chr(10) + \"cuda: str = '13.0'\" if path.name == 'version.py' else ''\n"
        "    return read(path, *rest, **names) + with_cuda\n"
        "pathlib.Path.read_text = read_text\n",
    )
    environment["CXX"] = quick_compiler
    _, package = build(ADATAPE_BUILD="python")
    assert (package / "_build_note.txt").exists()

    process, package = build(ADATAPE_CUDA="auto", ADATAPE_BUILD="auto", **environment)
    assert process.returncode == 0, process.stderr[-2000:]
    assert [path.name for path in package.iterdir()] == ["_C" + EXTENSION_SUFFIXES[0]]
    assert facts_of(package) == "none: it could not be built here: `pip install -v` shows why"
    for variable in ("ADATAPE_CUDA", "ADATAPE_BUILD"):
        required = {"ADATAPE_CUDA": "auto", "ADATAPE_BUILD": "auto", variable: "require"}
        process, _ = build(**environment, **required)
        assert process.returncode != 0
        assert "could not be built" in process.stderr.splitlines()[-1]

    process, package = build(ADATAPE_BUILD="require", ADATAPE_CUDA="skip", CXX=quick_compiler)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in package.iterdir()] == ["_C" + EXTENSION_SUFFIXES[0]]
    assert facts_of(package) == "none: ADATAPE_CUDA=skip asked for it"


def imported(note, package, terminal):
    """What importing a plain package with this note writes to stderr."""
    (package / "_build_note.txt").write_text(f"{note}\n")
    # An editable install's finder would bring the compiled part of this checkout.
    script = (
        "import sys\n"
        "editable = lambda finder: 'Editable' in getattr(finder, '__name__', '')\n"
        "sys.meta_path = [f for f in sys.meta_path if not editable(f)]\n"
        "import adatape_kernels"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}
    if not terminal:
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        return process.stderr
    reading, writing = pty.openpty()
    subprocess.run(command, env=environment, stderr=writing, check=True)
    os.close(writing)
    text = b""
    try:
        while part := os.read(reading, 4096):
            text += part
    except OSError:  # what a terminal answers when the other side has gone
        pass
    os.close(reading)
    return text.decode()


def test_importing_plain_python_in_a_terminal_warns(tmp_path):
    package = tmp_path / "adatape_kernels"
    for path in (ROOT / "adatape_kernels").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "adatape_kernels")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    words = "runs as plain Python, without its compiled kernels: CMake was not found"
    assert imported("CMake was not found", package, terminal=True).count(words) == 1
    assert words not in imported("CMake was not found", package, terminal=False)
    assert "plain Python" not in imported(ASKED_FOR, package, terminal=True)
