"""The benchmarks as a package: in a clone, and installed from a wheel without the clone."""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked_python import run

import adatape_kernels
from adatape_kernels import cli
from adatape_kernels.benchmarks.harness import records

ROOT = Path(adatape_kernels.__file__).parents[1]
REPORT = (
    "import sys; from adatape_kernels.benchmarks.harness import command; code = command.main("
    "['dispatch', '--shape', 'op=dual_ffn', '--quick', '--device', 'cpu']); "
    "print(command.__file__); print({'cases', 'records', 'timing', 'suites'} & set(sys.modules)); "
    "sys.exit(code)"
)


def run_outside(site, folder):
    return subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the package is installed as plain Python, from a copy of the clone."""
    missing = [name for name in ("pip", "setuptools") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    site, copy = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("copy")
    for name in ("adatape_kernels", "benchmarks", "csrc"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__", "_build_note.txt", "results")
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(copy)],
        env={**os.environ, "ADATAPE_BUILD": "python"},
        check=True,
        capture_output=True,
    )
    return site


def test_bench_runs_from_a_wheel_outside_the_clone(installed, tmp_path):
    before = sorted(installed.rglob("*.py"))
    result = run_outside(installed, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    file, top_level = result.stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(installed)
    assert top_level == "set()"
    (path,) = (tmp_path / "adatape-bench").iterdir()
    assert {row.op for row in records.read(path)} == {"ceiling", "dispatch"}
    assert sorted(installed.rglob("*.py")) == before
    assert not list(installed.rglob("*.csv"))


def test_the_wheel_has_every_module_of_the_benchmarks(installed):
    folder = installed / "adatape_kernels" / "benchmarks"
    found = {path.relative_to(folder) for path in folder.rglob("*.py")}
    here = ROOT / "benchmarks"
    assert found == {path.relative_to(here) for path in here.rglob("*.py")}


def test_bench_of_a_clone_writes_into_a_folder_of_the_current_directory(tmp_path):
    result = run(["-c", REPORT], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    file, top_level = result.stdout.splitlines()[-2:]
    assert Path(file) == ROOT / "benchmarks/harness/command.py"
    assert top_level == "set()"
    assert [path.name for path in tmp_path.iterdir()] == ["adatape-bench"]


def test_the_command_hands_its_arguments_to_the_benchmarks(capsys):
    assert cli.main(["bench", "tape_eject"]) == 2
    assert capsys.readouterr().err.startswith("bench: op: expected one of")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "program", ["gpu", "bench_cpu", "reports.result_tables", "reports.compare_results"]
)
def test_the_other_programs_run_by_their_module_names(program, monkeypatch, capsys):
    """What `python -m` does, in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"adatape_kernels.benchmarks.{program}", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_the_audit_runs_by_its_module_name():
    """In a process of its own, as it begins by starting itself again."""
    result = subprocess.run(
        [sys.executable, "-m", "adatape_kernels.benchmarks.audit.triton_audit", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
