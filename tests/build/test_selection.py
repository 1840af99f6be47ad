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


TEXT = """
def test_truth(device):
    assert call(device).counts.shape == (2,)

def test_lie_by_name(device):
    with use_backend("eager"):
        call(device)

def test_lie_by_default(device):
    with use_backend(None):
        call(device)

def test_lie_without_a_call(device):
    pass

def test_lie_of_the_backward(device):
    query, keys = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4)
    weights = tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0).weights
    with use_backend("eager"):
        weights.sum().backward()

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

@pytest.mark.needs_sanitizer
def test_watched(device):
    call(device)
"""


def run(folder, *options, **environment):
    """Run the test file; return the outcomes of each case that was generated, by its id."""
    file = folder / "test_some.py"
    file.write_text(HEAD + TEXT)
    paths = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    command = "-m pytest -p conftest -p no:cacheprovider -q -rA -n 0".split()
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(folder)]
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
    assert found, result.stdout
    return found


@pytest.fixture
def without_sanitizer(monkeypatch):
    monkeypatch.delenv("ADATAPE_SANITIZER", raising=False)


def test_which_cases_are_generated_and_that_ids_tell_the_truth(tmp_path, without_sanitizer):
    """One run of pytest tells all of it: starting one takes much longer than its tests."""
    found = run(tmp_path)
    ids = set(found)

    assert {"test_truth[cpu-eager]", "test_truth[cpu-triton]"} <= ids
    for name in ids:
        if name.startswith("test_truth"):
            assert found[name] == {"PASSED"}, name

    # An id that lies is a failure: another backend ran, or none, or one of them the backward.
    for lie in ("by_name", "by_default", "without_a_call"):
        assert "ERROR" in found[f"test_lie_{lie}[cpu-triton]"], lie
    assert "ERROR" in found["test_lie_of_the_backward[cpu-triton]"]
    assert found["test_lie_of_the_backward[cpu-eager]"] == {"PASSED"}

    # Cases that cannot exist are not generated.
    assert {"test_dtype[cpu-eager-d]", "test_dtype[cpu-triton-h]", "test_one[cpu-triton]"} <= ids
    assert "test_dtype[cpu-triton-d]" not in ids and "test_one[cpu-eager]" not in ids
    assert {"test_even[cpu-eager-2]", "test_plain[cpu]"} <= ids
    assert not any(name.endswith("-1]") for name in ids)

    assert not any(name.startswith("test_watched") for name in ids)


def test_a_test_about_a_sanitizer_is_collected_where_there_is_one(tmp_path):
    found = run(tmp_path, "-k", "watched", ADATAPE_SANITIZER="asan")
    assert {name.partition("[")[0] for name in found} == {"test_watched"}
