import contextlib
import os
from importlib.util import find_spec

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # on a GPU machine perhaps, where nothing is to be installed
    from no_hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels run in triton's interpreter, which is chosen when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulation

from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import BACKENDS, current_backend, explain, use_backend

if triton_runtime.INTERPRETED:
    emulation.sum_products_in_one_order()
if not torch.cuda.is_available() and (library := emulation.cuda_host_library()):
    emulation.load_cuda_host(library)

# What a GPU machine may lack, and the files that are of no use without it.
_NEEDS = {
    "safetensors": ("test_checkpoint.py", "test_demo.py", "test_train.py"),
    "matplotlib": ("test_demo.py",),
    "PIL": ("test_data.py", "test_train.py"),
}
_missing = [name for name in _NEEDS if find_spec(name) is None]
collect_ignore = sorted({file for name in _missing for file in _NEEDS[name]})


def pytest_terminal_summary(terminalreporter):
    for name in _missing:
        terminalreporter.line(f"left out: {', '.join(_NEEDS[name])} ({name} is not installed)")


# Without it cuBLAS refuses to run under deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Fixtures named by a test only choose device and backend, so examples may share them.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def deterministic_mode():
    """The whole suite runs so: torch.empty is filled with NaN, so an unwritten output shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two threads that wait for each other over tiny tensors are slow on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """A test that takes `device` runs for each device, and each backend that serves its OP there.

    A module opts in by naming its op in OP; None stands for code that no backend serves.
    """
    if "device" not in metafunc.fixturenames or not hasattr(metafunc.module, "OP"):
        return
    op, cases = metafunc.module.OP, []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        reasons = explain(op, device, torch.float32) if op else {}
        marks = [pytest.mark.cuda] if device == "cuda" else []
        for backend in [b for b in BACKENDS if reasons[b] == "serves"] if op else [None]:
            name = f"{device}-{backend}" if backend else device
            cases.append(pytest.param((device, backend), id=name, marks=marks))
    metafunc.parametrize("device", cases, indirect=True)


@pytest.fixture
def device(request):
    """The device; its backend serves every op of the test, skipped where it lacks the `dtype`."""
    device, backend = request.param
    with contextlib.ExitStack() as stack:
        if backend is not None:
            dtype = request.node.callspec.params.get("dtype", torch.float32)
            reason = explain(request.module.OP, device, dtype)[backend]
            if reason != "serves":
                pytest.skip(f"{backend} does not take {dtype}: {reason}")
            stack.enter_context(use_backend(backend))
        yield device


@pytest.fixture
def not_handed_over(request):
    """Skip what CUDA C++ on the host hands to Triton, whose interpreter runs it anyway."""
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
        if device == "cpu" and current_backend() == "cuda":
            pytest.skip("Triton takes what this test asks for; other tests have the C++ kernels")


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request, device):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before counts as a recompilation."""
    torch.compiler.reset()
