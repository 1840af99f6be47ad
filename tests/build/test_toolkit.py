"""Which nvcc is taken and for which GPUs: csrc/cuda/toolkit.cmake, and what setup.py says of it.

The programs are scripts that print the version of an nvcc which is not here.
"""

import importlib.util
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
CMAKE = Path(sysconfig.get_path("scripts"), "cmake")
BEFORE_BLACKWELL = "80-real 90a-real 90-virtual"
SINCE_BLACKWELL = "80-real 90a-real 120-real 100"

needs_cmake = pytest.mark.skipif(not CMAKE.exists(), reason="pip's CMake is not installed")

ASK = """
cmake_minimum_required(VERSION 3.25.2)
include({toolkit})
look_at_nvcc("{nvcc}" "{torch_cuda}")
message("${{nvcc_version}}|${{cuda_architectures}}|${{why_not_nvcc}}")
"""


@pytest.fixture
def nvcc(tmp_path):
    """Makes a program that says it is an nvcc of this version, and compiles as `compile` says."""

    def make(version, compile="exit 0"):
        path = tmp_path / "nvcc"
        line = f"Cuda compilation tools, release {version}, V{version}.99"
        path.write_text(
            "#!/bin/sh\n"
            f'echo "$@" >> {tmp_path}/calls\n'
            f"if [ \"$1\" = --version ]; then echo 'nvcc: NVIDIA'; echo '{line}'; exit 0; fi\n"
            f"{compile}\n"
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def look(tmp_path):
    """Asks CMake what it makes of an nvcc beside a torch of this CUDA."""

    def ask(nvcc, torch_cuda):
        script = tmp_path / "ask.cmake"
        toolkit = ROOT / "csrc/cuda/toolkit.cmake"
        script.write_text(ASK.format(toolkit=toolkit, nvcc=nvcc, torch_cuda=torch_cuda))
        command = [CMAKE, "-P", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        version, architectures, why = done.stderr.strip().split("|")
        return version, architectures.replace(";", " "), why

    return ask


@needs_cmake
@pytest.mark.parametrize(
    ("version", "torch_cuda", "architectures", "why"),
    [
        ("12.0", "12.1", BEFORE_BLACKWELL, ""),
        ("12.4", "12.8", BEFORE_BLACKWELL, ""),
        ("12.7", "", BEFORE_BLACKWELL, ""),
        ("12.8", "12.6", SINCE_BLACKWELL, ""),
        ("13.0", "13.0", SINCE_BLACKWELL, ""),
        ("13.2", "", SINCE_BLACKWELL, ""),
        ("11.8", "11.8", BEFORE_BLACKWELL, "is nvcc 11.8, and C++20 needs 12.0 or newer"),
        ("12.9", "13.0", SINCE_BLACKWELL, "is of CUDA 12.9 and torch of 13.0"),
        ("13.0", "12.8", SINCE_BLACKWELL, "their major versions must be equal"),
    ],
)
def test_an_nvcc_is_taken_or_refused_by_its_version(
    look, nvcc, version, torch_cuda, architectures, why
):
    found = look(nvcc(version), torch_cuda)
    assert found[:2] == (version, architectures)
    assert why in found[2] and bool(why) == bool(found[2])


@needs_cmake
@pytest.mark.parametrize("program", ["false", "/nowhere/nvcc"])
def test_what_is_no_nvcc_is_named(look, program):
    assert look(program, "13.0") == ("", "", f"{program} does not run as nvcc")


@needs_cmake
@pytest.mark.parametrize(
    ("says", "why"),
    [
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_120'",
            "nvcc fatal : Unsupported gpu architecture 'compute_120'",
        ),
        (
            'In file included from x:\\n/usr/h.h:143:2: error: #error -- unsupported GNU; "gcc" $X',
            "/usr/h.h:143:2: error: error -- unsupported GNU 'gcc' X",
        ),
        ("ptxas: not found", "ptxas: not found"),
    ],
)
def test_an_nvcc_that_cannot_compile_is_refused_in_its_own_words(look, nvcc, says, why):
    program = nvcc("13.0", compile=f"printf '%b\\n' {shlex.quote(says)} >&2; exit 1")
    assert look(program, "13.0")[2] == f"{program} cannot compile for GPUs: {why}"


@needs_cmake
def test_every_architecture_is_tried(look, nvcc, tmp_path):
    look(nvcc("12.8"), "12.8")
    tried = (tmp_path / "calls").read_text()
    for each in ("80,code=sm_80", "90a,code=sm_90a", "120,code=sm_120"):
        assert f"-gencode arch=compute_{each}" in tried
    assert "-gencode arch=compute_100,code=[sm_100,compute_100] -c probe.cu" in tried
    look(nvcc("12.1"), "12.8")
    assert "arch=compute_90,code=compute_90 -c" in (tmp_path / "calls").read_text()


@pytest.fixture(scope="module")
def setup_py():
    """The functions of setup.py, which builds nothing when it is run in vain."""
    before = setuptools.setup
    setuptools.setup = lambda **options: None
    try:
        spec = importlib.util.spec_from_file_location("adatape_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        setuptools.setup = before


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "-- The CUDA compiler identification is unknown\nCMake Error at x.cmake:8 (message):\n"
            "  Compiling the CUDA compiler identification source file failed.\n\n"
            "  nvcc fatal   : Unsupported gpu architecture 'compute_100'\n\n",
            "Unsupported gpu architecture 'compute_100'",
        ),
        (
            "[3/9] Building CUDA object x.o\nFAILED: x.o\n/usr/include/host_config.h:143:2: error: "
            '#error -- unsupported GNU version! "gcc" later than 15\n  143 | #error -- un\n',
            "error -- unsupported GNU version 'gcc' later than 15",
        ),
        (
            "CMake Error at CMakeLists.txt:128 (message):\n  ADATAPE_CUDA=require, but there is\n"
            "  none: torch 2.13.0+cpu has no CUDA\n\n\n-- Configuring incomplete\n",
            "ADATAPE_CUDA=require, but there is none: torch 2.13.0+cpu has no CUDA",
        ),
        ("", "`pip install -v` shows why"),
    ],
)
def test_the_first_error_is_the_reason(setup_py, output, reason):
    assert setup_py.reason_in(output) == reason


def test_a_reason_is_one_line_that_cmake_and_a_compiler_take(setup_py):
    found = setup_py.reason_in("x.cu(3): error: no ${such};\t\"a\\b\" %d $<x> 'é'\n" + "y" * 999)
    assert found == "no such 'a b' d <x> 'é'"
    assert len(setup_py.reason_in("error: " + "y" * 999)) == 200
