"""A sample of what `make audit` and the roofline do; each needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adatape_kernels
from adatape_kernels.ops import triton_runtime

ROOT = Path(adatape_kernels.__file__).parents[1]

pytestmark = pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"adatape_kernels.benchmarks.audit.{program}", *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )


def test_kernels_compile_for_a_gpu_within_its_limits():
    result = run("triton_audit", "--sample")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for kernel in ("_tape_select_fwd", "_tape_gather_fwd", "_elastic_attention_fwd"):
        assert kernel in result.stdout
    assert result.stdout.endswith(" 0 faults\n")


def test_gathering_and_attention_move_no_more_than_they_should():
    result = run("roofline", "--quick")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("elastic_attention") == 2
    assert result.stdout.endswith("0 over the limit of 1.3\n")
