"""No call of torch.ops, whatever its arguments, ends the process or gives silent garbage."""

import os
import subprocess
import sys
from pathlib import Path

import emulation
import forked_python
import pytest

from adatape_kernels.ops.op import why_absent

TESTS = Path(__file__).parents[1]
SERVED_BY = ["eager", "cpp", "triton", "cuda", "adatape_cpu", "adatape_cuda"]
# Everything but the calls is imported where the process is forked, save for what lies beside them.
PROGRAM = """
import runpy, sys
sys.path[:0] = sys.argv[2:]
runpy.run_path(f"{sys.argv[2]}/hostile_calls.py", run_name="__main__")
"""


def run(served_by):
    """Make the calls in a process of their own."""
    words = ["-c", PROGRAM, served_by, str(TESTS / "ops"), str(TESTS)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return forked_python.run(words, capture_output=True, text=True)
    # Triton is imported where processes are forked, and decides then that it interprets nothing.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("served_by", SERVED_BY)
def test_a_wrong_argument_is_refused_or_does_no_harm(served_by):
    """hostile_calls.py says which calls these are."""
    if served_by == "triton" and why_absent("triton"):
        pytest.skip("triton is not installed")
    if "cuda" in served_by and not emulation.cuda_host_library():
        pytest.skip("the CUDA kernels were not built for the host")
    if served_by in ("cpp", "adatape_cpu") and why_absent("cpp"):
        pytest.skip(why_absent("cpp"))
    result = run(served_by)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, (result.returncode, lines[-1:], result.stderr[-2000:])
    assert [line for line in lines if line.startswith("WRONG")] == []
    assert int(lines[-1].split()[0]) > 1000
