"""Where Triton cannot start its kernels it refuses with the reason, and the next backend serves."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from adatape_kernels.ops import device_facts, op, triton_runtime, triton_start
from adatape_kernels.ops.device_facts import EMULATED
from adatape_kernels.ops.op import operation, registered_ops

pytestmark = pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")

GPU = torch.device("cuda", 0)
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc was not found")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A GPU that Triton has never started a kernel on, in a process that may compile its driver."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and Triton has its driver")
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    runtime = importlib.import_module("triton.runtime.driver")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "libcuda.so.1").touch()
    for name in ("libcuda_dirs", "library_dirs"):
        getattr(nvidia, name).cache_clear()
    if hasattr(nvidia.CudaUtils, "instance"):
        monkeypatch.delattr(nvidia.CudaUtils, "instance")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "driver", runtime.DriverConfig())
    monkeypatch.setattr(importlib.import_module("triton.runtime"), "driver", runtime.driver)
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    triton_start.why_triton_cannot_start.cache_clear()
    yield monkeypatch
    triton_start.why_triton_cannot_start.cache_clear()
    for name in ("libcuda_dirs", "library_dirs"):
        getattr(nvidia, name).cache_clear()


def compiles_its_driver():
    build = importlib.import_module("triton.backends.nvidia.driver")
    return hasattr(build, "compile_module_from_src")


needs_compiler = pytest.mark.skipif(
    triton_runtime.INSTALLED and not compiles_its_driver(), reason="this Triton compiles nothing"
)


@needs_compiler
def test_without_a_compiler_the_reason_is_named(fresh):
    fresh.setenv("PATH", "")
    why = triton_start.why_triton_cannot_start()
    expected = "no C compiler was found (gcc or clang; CC names another)"
    assert why == f"Triton cannot start: {expected}"


@needs_compiler
@pytest.mark.parametrize("compiler", ["/nowhere/cc", ""])
def test_a_compiler_that_is_not_there_is_named(fresh, compiler):
    fresh.setenv("CC", compiler)
    assert f"no C compiler was found ({compiler}; " in triton_start.why_triton_cannot_start()


@needs_compiler
@needs_gcc
def test_without_pythons_headers_the_reason_is_named(fresh, tmp_path):
    paths = {**sysconfig.get_paths(), "include": str(tmp_path)}
    fresh.setattr(sysconfig, "get_paths", lambda **scheme: paths)
    why = triton_start.why_triton_cannot_start()
    assert why == "Triton cannot start: Python.h was not found (Debian and Ubuntu: python3-dev)"


@needs_compiler
@pytest.mark.parametrize("script", ["echo 'x: error: no space left' >&2; exit 1", "exit 1"])
def test_a_compiler_that_fails_is_named(fresh, tmp_path, script):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    said = "x: error: no space left" if "echo" in script else "it says nothing"
    why = triton_start.why_triton_cannot_start()
    assert why == f"Triton cannot start: {compiler} does not compile ({said})"


@pytest.mark.parametrize("launchers", [True, False])
def test_a_driver_that_is_made_already_is_enough_unless_launchers_are_compiled(fresh, launchers):
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    fresh.setattr(importlib.import_module("triton.runtime"), "driver", SimpleNamespace(active=1))
    if launchers:
        fresh.setattr(nvidia, "make_launcher", None, raising=False)
    else:
        fresh.delattr(nvidia, "make_launcher", raising=False)
    fresh.setenv("PATH", "")
    why = triton_start.why_triton_cannot_start()
    assert (why is None) == (not launchers)
    if launchers:
        assert why.startswith("Triton cannot start kernels: no C compiler was found (gcc or clang")


@needs_compiler
@needs_gcc
def test_a_driver_that_cannot_be_loaded_is_named(fresh):
    """The stub is compiled, and no library of CUDA's driver is there to link it with."""
    why = triton_start.why_triton_cannot_start()
    assert re.match(r"Triton cannot start: \w+: .", why) and "\n" not in why


@pytest.fixture
def with_facts(monkeypatch):
    """Lets cuda:0 be a GPU with these facts, beside kernels in CUDA C++ that are installed."""

    def here(facts, cuda_absent=None):
        monkeypatch.setattr(op, "facts_of", lambda device: facts)
        monkeypatch.setattr("adatape_kernels.ops.implementation.facts_of", lambda device: facts)
        for name in registered_ops():
            found = operation(name)
            given = dict(found.implementations)
            if "cuda" in given:
                fields = {**vars(given["cuda"]), "absent": cuda_absent}
                given["cuda"] = type(given["cuda"])(**fields)
            monkeypatch.setattr(found, "implementations", given)
            monkeypatch.setattr(found, "_candidates", {})

    return here


def backends_of(name, dtype=torch.float32):
    return [each.backend for each in operation(name)._candidates_for((), GPU, dtype)]


@needs_compiler
def test_with_an_empty_path_the_next_backend_serves(fresh, with_facts):
    with_facts(EMULATED)
    fresh.setenv("PATH", "")
    assert backends_of("tape_select") == ["cuda", "eager"]
    assert backends_of("add_layer_norm") == ["eager"]
    with_facts(EMULATED, cuda_absent="not built")
    for name in registered_ops():
        assert backends_of(name) == ["eager"]
    found = operation("tape_select")
    assert found._candidates_for(("triton",), GPU, torch.float32) == ()
    why = found.refusal("triton", [torch.zeros(2, 8)], "cuda", EMULATED)
    assert why.startswith("Triton cannot start: no C compiler was found")


def test_gpus_older_than_ampere_are_refused_by_name(with_facts):
    old = EMULATED._replace(name="Tesla T4", capability=(7, 5))
    with_facts(old)
    reason = "it needs compute capability 8.0 or newer, and Tesla T4 has 7.5"
    for name in registered_ops():
        assert backends_of(name) == ["eager"]
        typical = next(iter(operation(name).typical.values()))(torch.bfloat16)
        for backend in ("triton", "cuda"):
            if backend in operation(name).implementations:
                refusal = operation(name).refusal(backend, typical, "cuda", old, installed=True)
                assert refusal == reason
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        with_facts(EMULATED._replace(capability=capability))
        assert device_facts.too_old(EMULATED._replace(capability=capability)) is None
        assert backends_of("tape_gather")[-2:] == ["cuda", "eager"]


def test_devices_of_a_machine_are_asked_each_for_itself(with_facts, monkeypatch):
    with_facts(EMULATED)
    facts = {0: EMULATED._replace(capability=(7, 0)), 1: EMULATED}
    monkeypatch.setattr(
        "adatape_kernels.ops.implementation.facts_of", lambda device: facts[device.index]
    )
    for index, expected in ((0, ["eager"]), (1, ["cuda", "eager"])):
        found = operation("tape_gather")._candidates_for(
            (), torch.device("cuda", index), torch.float32
        )
        assert [each.backend for each in found][-2:] == expected[-2:]


ON_A_GPU = """
import torch, adatape_kernels as ak
from adatape_kernels.ops.op import record
query, keys = torch.randn(2, 8, device="cuda"), torch.randn(9, 8, device="cuda")
call = dict(num_tape_tokens=3, topk=2, halt_threshold=1)
with record() as ran:
    ak.ops.tape_select(query, keys, **call)
print(ran[0].backend)
try:
    with ak.use_backend("triton"):
        ak.ops.tape_select(query, keys, **call)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.cuda
@needs_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_call_on_a_gpu_with_an_empty_path(tmp_path):
    environment = {**os.environ, "PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("CC", None)
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    served, refused = done.stdout.splitlines()
    assert served in ("cuda", "eager")
    assert "triton: Triton cannot start: no C compiler was found" in refused
