"""Which cases are generated, and that an id names the backend that ran: tests/selection.py.

Small test files, written here, run under the suite's own conftest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adatape_kernels.ops import triton_runtime

TESTS = Path(__file__).parents[1]
HEAD = """
import pytest, torch
from adatape_kernels.ops import tape_select
from adatape_kernels.ops.op import use_backend

OP = "tape_select"

def call(device, dtype=torch.float32):
    query, keys = torch.randn(2, 4, device=device), torch.randn(5, 4, device=device)
    args = query.to(dtype), keys.to(dtype)
    return tape_select(*args, num_tape_tokens=2, topk=2, halt_threshold=1.0)
"""

pytestmark = pytest.mark.skipif(
    not triton_runtime.INTERPRETED, reason="there is one backend, eager, on which to tell the truth"
)


@pytest.fixture
def outcomes(tmp_path):
    """Runs a test file; returns the outcome of each case that was generated, by its id."""

    def run(text, *options, **environment):
        file = tmp_path / "test_some.py"
        file.write_text(HEAD + text)
        paths = os.pathsep.join([str(TESTS), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, **environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        command = "-m pytest -p conftest -p no:cacheprovider -q -rA -n 0".split()
        command += ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path)]
        result = subprocess.run(
            [sys.executable, *command, *options, str(file)],
            env=environment,
            capture_output=True,
            text=True,
        )
        found = {}
        for line in result.stdout.splitlines():
            outcome, _, rest = line.partition(" ")
            if outcome in ("PASSED", "FAILED", "ERROR") and "::" in rest:
                name = rest.partition("::")[2].partition(" - ")[0]
                found.setdefault(name, set()).add(outcome)
        assert found or "no tests ran" in result.stdout or "skipped" in result.stdout, result.stdout
        return found

    return run


def test_an_id_tells_the_backend_that_ran(outcomes):
    found = outcomes("""
def test_truth(device):
    assert call(device).counts.shape == (2,)
""")
    assert {"test_truth[cpu-eager]", "test_truth[cpu-triton]"} <= set(found)
    assert set(map(frozenset, found.values())) == {frozenset(["PASSED"])}


@pytest.mark.parametrize(
    "body",
    ["with use_backend('eager'): call(device)", "with use_backend(None): call(device)", "pass"],
)
def test_an_id_that_lies_is_a_failure(outcomes, body):
    """By another backend, or by none."""
    found = outcomes(f"""
def test_lie(device):
    {body}
""")
    assert "ERROR" in found["test_lie[cpu-triton]"]


def test_an_id_that_lies_of_the_backward_is_a_failure(outcomes):
    found = outcomes("""
def test_lie(device):
    query, keys = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4)
    weights = tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0).weights
    with use_backend("eager"):
        weights.sum().backward()
""")
    assert "ERROR" in found["test_lie[cpu-triton]"]
    assert found["test_lie[cpu-eager]"] == {"PASSED"}


def test_cases_that_cannot_exist_are_not_generated(outcomes):
    found = outcomes("""
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["d", "h"])
def test_dtype(device, dtype):
    call(device, dtype)

@pytest.mark.backends("triton")
def test_one(device):
    call(device)

@pytest.mark.absent_if(reason=lambda device, backend, n, **_: "odd" if n % 2 else None)
@pytest.mark.parametrize("n", [1, 2])
def test_even(device, n):
    call(device)

@pytest.mark.no_backend
def test_plain(device):
    pass
""")
    ids = set(found)
    assert {"test_dtype[cpu-eager-d]", "test_dtype[cpu-triton-h]", "test_one[cpu-triton]"} <= ids
    assert "test_dtype[cpu-triton-d]" not in ids and "test_one[cpu-eager]" not in ids
    assert {"test_even[cpu-eager-2]", "test_plain[cpu]"} <= ids
    assert not any(name.endswith("-1]") for name in ids)


@pytest.mark.parametrize("sanitizer", [None, "asan"])
def test_a_test_about_a_sanitizer_is_collected_only_there(outcomes, sanitizer):
    found = outcomes(
        """
@pytest.mark.needs_sanitizer
def test_watched(device):
    call(device)
""",
        ADATAPE_SANITIZER=sanitizer,
    )
    assert bool(found) == (sanitizer is not None)
