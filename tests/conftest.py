import contextlib
import os
import sys
from importlib.util import find_spec

# Torch's compiler imports setuptools, which must come before anybody imports distutils, as a test
# without Python's usual finders may do.
if "distutils" not in sys.modules:
    with contextlib.suppress(ImportError):
        import setuptools  # noqa: F401

# Torch keeps compiled backwards between runs, by a key in which an op's own backward and its schema
# are not: a test would run what the code was before. Torch reads this when it is imported.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # on a GPU machine perhaps, where nothing is to be installed
    from no_hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels run in triton's interpreter, which is chosen when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import case_sample
import emulation
import selection

from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import BACKENDS, record, use_backend, why_absent

if triton_runtime.INTERPRETED:
    emulation.sum_products_in_one_order()
    emulation.keep_the_interpreter_ready()
if not torch.cuda.is_available() and (library := emulation.cuda_host_library()):
    emulation.load_cuda_host(library)
if library := os.environ.get("ADATAPE_EMULATED_TILES"):
    emulation.load_emulated_tiles(library)

# What a GPU machine may lack, and the files that are of no use without it.
_RUNS = ("checkpoint", "demo", "finetune", "flushing", "lenient_output")
_TRAINING = ("every_image", "train", "train_from_source", "train_loading")
_OF_RUNS = (
    *(f"recipes/test_{name}.py" for name in _RUNS),
    *(f"recipes/training/test_{name}.py" for name in _TRAINING),
)
# Tests of commands, whose options jsonargparse parses.
_OF_COMMANDS = (
    "cli/*",
    "recipes/budget",
    "recipes/heatmap",
    "benchmarks/test_bench_installed.py",
    "docs/test_code_blocks.py",
    "models/test_config_values.py",
    "models/test_model_names.py",
    "recipes/compare/test_compare_command.py",
    "recipes/distributed/test_ranks.py",
    "recipes/distributed/test_torchrun_signals.py",
    "recipes/parity/test_parity_table.py",
    "recipes/test_check.py",
    "recipes/test_check_jobs.py",
    "recipes/test_demo.py",
    "recipes/test_export_program.py",
    "recipes/test_finetune.py",
    "recipes/test_hostile_golden.py",
    "recipes/test_lenient_output.py",
    "recipes/test_mutated_runs.py",
    "recipes/test_output_folder.py",
    "recipes/test_predict.py",
    "recipes/test_reading_options.py",
    "recipes/test_run_folder.py",
    "recipes/training/test_best_model.py",
    "recipes/training/test_devices.py",
    "recipes/training/test_drawn_thresholds.py",
    "recipes/training/test_every_image.py",
    "recipes/training/test_execution.py",
    "recipes/training/test_extended_run.py",
    "recipes/training/test_graphed_step.py",
    "recipes/training/test_hostile_training.py",
    "recipes/training/test_imagenet_miniature.py",
    "recipes/training/test_init.py",
    "recipes/training/test_regularised_run.py",
    "recipes/training/test_rerun.py",
    "recipes/training/test_tensorboard_events.py",
    "recipes/training/test_train.py",
    "recipes/training/test_train_compared.py",
    "recipes/training/test_train_from_source.py",
    "test_scenic.py",
)
_NEEDS = {
    "jsonargparse": _OF_COMMANDS,
    "safetensors": (
        "models/test_hub.py",
        "models/test_model_file.py",
        "models/test_model_file_tensors.py",
        "recipes/test_export_program.py",
        "recipes/test_predict.py",
        "recipes/test_writing_processes.py",
        "recipes/distributed/test_checkpoint_parts.py",
        "recipes/training/test_init.py",
        "recipes/training/test_regularised_run.py",
        *_OF_RUNS,
    ),
    "matplotlib": (
        "recipes/budget/test_budget_beside.py",
        "recipes/heatmap/test_heatmap_pictures.py",
        "recipes/test_demo.py",
        "recipes/test_pictures.py",
        "recipes/test_titles_of_pictures.py",
    ),
    "PIL": ("data/test_*.py", *_OF_RUNS),
}
_missing = [name for name in _NEEDS if find_spec(name) is None]
collect_ignore_glob = sorted({file for name in _missing for file in _NEEDS[name]})


def pytest_addoption(parser):
    explained = "run at most N cases of each kind: see case_sample.py"
    parser.addoption("--cases-of-a-kind", type=int, metavar="N", help=explained)


def pytest_configure(config):
    """Count what a GPU would compile: in a clone, where benchmarks/gpu.py reckons with it."""
    if triton_runtime.INTERPRETED and find_spec("adatape_kernels.benchmarks"):
        from count_compilations import CompilationCounter

        config.pluginmanager.register(CompilationCounter())


def pytest_terminal_summary(terminalreporter):
    for name in _missing:
        terminalreporter.line(f"left out: {', '.join(_NEEDS[name])} ({name} is not installed)")
    for backend in BACKENDS:
        if reason := why_absent(backend):
            terminalreporter.line(f"left out: every case of the backend {backend} ({reason})")


# The kernels of the CPU allocate past torch, which then fills nothing; see csrc/cpu/cpu_tensors.h.
os.environ["ADATAPE_POISON"] = "1"
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
    """Generate a test that takes `device` for each device, and each backend that serves there."""
    if "device" not in metafunc.fixturenames or not hasattr(metafunc.module, "OP"):
        return
    cases, plain = [], metafunc.definition.get_closest_marker("no_backend") is not None
    for device, backend in selection.devices_and_backends(metafunc.module, plain):
        marks = [pytest.mark.cuda] if device == "cuda" else []
        name = f"{device}-{backend}" if backend else device
        cases.append(pytest.param((device, backend), id=name, marks=marks))
    metafunc.parametrize("device", cases, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    made = yield
    return selection.existing(made) if isinstance(made, list) else made


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        selection.mark_for_other_runs(item)
    most = config.getoption("--cases-of-a-kind")
    if most is not None:
        kept = case_sample.sample(items, most)
        numbers = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in numbers])
        items[:] = kept


@pytest.fixture
def device(request):
    """The device. Its backend serves the test, and every call of the module's op went to it.

    The dispatcher's record says so after the test, of forward and backward: an id that names
    another backend than the one that ran is a failure. `runs_no_op` marks a test without a
    call, `checks_what_ran` one that looks at a record of its own.
    """
    device, backend = request.param
    if backend is None:
        yield device
        return
    with use_backend(backend), record() as ran:
        yield device
    if any(request.node.get_closest_marker(name) for name in ("runs_no_op", "checks_what_ran")):
        return
    ops = selection.with_backwards(selection.ops_of(request.module))
    backends = {each.backend for each in ran if each.op in ops}
    assert backends == {backend}, f"{', '.join(ops)}: expected {backend} to run, got {backends}"


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request, device):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before counts as a recompilation."""
    torch.compiler.reset()
