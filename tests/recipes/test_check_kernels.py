"""Every case of `check` enters the kernel that its line names, and no kernel is left out.

Kernels are noted when they are launched and not run, so that sizes meant for a GPU cost nothing
here; what the calls return is meaningless then.
"""

import importlib
import pkgutil
import re
from pathlib import Path

import emulation
import pytest
import torch

from adatape_kernels import ops
from adatape_kernels.benchmarks import gpu
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import NotServed, operation, registered_ops
from adatape_kernels.recipes import check
from adatape_kernels.recipes.check_cases import check_cases

CUDA_SOURCES = Path(__file__).parents[2] / "csrc/cuda"


@pytest.fixture(autouse=True)
def values_are_not_looked_at(monkeypatch):
    """What a kernel that did not run has left in its results would be refused by the next op."""
    for name in registered_ops():
        monkeypatch.setattr(operation(name), "check_values", None)
        monkeypatch.setattr(operation(name), "_candidates", {})


def kernels_of(backend):
    return [kernel for kernel in check._kernels("cpu") if kernel.backend == backend]


def entered(backend, note):
    """Yield each case that a kernel of the backend serves, with what it launched, by `note`."""
    for case in check_cases():
        for kernel in kernels_of(backend):
            if kernel.op == case.op:
                given = [x.to(kernel.dtype) for x in case.inputs()]
                try:
                    yield case, note(lambda: check._evaluate(case, given, backend))  # noqa: B023
                except NotServed:
                    continue


@pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="Triton's kernels serve no CPU here")
def test_every_triton_kernel_is_entered():
    """No more of them are compiled, in all three dtypes, than `make gpu` reckons with."""
    compilations = {torch.float32: set(), torch.float16: set()}

    def note(call):
        with triton_runtime.recording() as launches:
            call()
        for launch in launches:
            dtypes = {x.dtype for x in launch.arguments.values() if isinstance(x, torch.Tensor)}
            half = torch.float16 if torch.float16 in dtypes else torch.float32
            compilations[half].add(emulation.compilation(launch))
        return {launch.kernel.__name__ for launch in launches}

    seen = set()
    for case, names in entered("triton", note):
        ours = {n for n in names if not re.match(r"_(segment_sum|count|place|add_parts)_", n)}
        # A read calls two ops, and its gradient launches the kernels of both. Attention of one
        # projection has the kernels of attention of three tensors.
        own = "tape" if case.op == "tape_read_bwd" else case.op.removesuffix("_qkvpacked")
        assert ours and all(name.startswith(f"_{own}_") for name in ours), (case.name, names)
        seen |= names
    every = set()
    for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        module = importlib.import_module(found.name)
        every |= {name for name in vars(module) if re.fullmatch(r"_\w+_kernel", name)}
    assert seen == every
    # The interpreter has no bfloat16, which takes as many as float16.
    number = len(compilations[torch.float32]) + 2 * len(compilations[torch.float16])
    assert gpu.CHECK_COMPILATIONS / 2 < number <= gpu.CHECK_COMPILATIONS


@pytest.mark.skipif(emulation.cuda_host_library() is None, reason="the CUDA host was not built")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CUDA kernels run on the GPU that is here"
)
@pytest.mark.parametrize("kib", [99, 163, 227])
def test_every_launch_in_csrc_cuda_is_entered(kib):
    """On each GPU, by the shared memory that a block may have there."""

    def note(call):
        with emulation.noted_launches() as launches:
            call()
        assert all(each.bytes <= kib << 10 for each in launches)
        return {each.place for each in launches}

    seen = set()
    with emulation.shared_memory(kib):
        for case, places in entered("cuda", note):
            files = {place.partition(":")[0] for place in places} - {"sum_segments.h"}
            if case.op == "tape_read_bwd":
                assert files == {"tape_select.cu", "tape_gather.cu", "tape_read.cu"}, case.name
            else:
                assert files == {f"{case.op.removesuffix('_qkvpacked')}.cu"}, case.name
            seen |= places
    every = {
        f"{path.name}:{number}"
        for path in (*CUDA_SOURCES.glob("*.cu"), CUDA_SOURCES / "sum_segments.h")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"\blaunch\(", line)
    }
    assert seen == every
