"""No call of torch.ops, whatever its arguments, ends the process or gives silent garbage."""

import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

from adatape_kernels.ops.op import why_absent

TESTS = Path(__file__).parents[1]
SERVED_BY = ["eager", "cpp", "triton", "cuda", "adatape_cpu", "adatape_cuda"]


@pytest.mark.parametrize("served_by", SERVED_BY)
def test_a_wrong_argument_is_refused_or_does_no_harm(served_by):
    """hostile_calls.py says which calls these are."""
    if served_by == "triton" and why_absent("triton"):
        pytest.skip("triton is not installed")
    if "cuda" in served_by and not emulation.cuda_host_library():
        pytest.skip("the CUDA kernels were not built for the host")
    if served_by in ("cpp", "adatape_cpu") and why_absent("cpp"):
        pytest.skip(why_absent("cpp"))
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "ops")]
    given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*given, *paths]),
        "TRITON_INTERPRET": "1",
    }
    result = subprocess.run(
        [sys.executable, str(TESTS / "ops/hostile_calls.py"), served_by],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, (result.returncode, lines[-1:], result.stderr[-2000:])
    assert [line for line in lines if line.startswith("WRONG")] == []
    assert int(lines[-1].split()[0]) > 1000
