"""Counts, without a GPU, what the tests of `make gpu` would let Triton compile on one.

A plugin of pytest, which conftest.py registers: where kernels run in Triton's interpreter, each
launch of a case that `make gpu` would choose is noted by what Triton would compile it for
(`emulation.compilation`). The interpreter has no bfloat16, which takes as many compilations, and as
many cases, as float16, so that those of float16 count twice. Launches within a `recording` of a
test's own are not counted. A run in which there are more than benchmarks/gpu.py reckons with fails.
"""

import hashlib

import case_sample
import emulation
import pytest
import torch

from adatape_kernels.benchmarks import gpu
from adatape_kernels.ops import triton_runtime


class _Launches(list):
    """Stands in for the launches of a `recording` that runs them; keeps none of them."""

    def __init__(self):
        super().__init__()
        self.counts = False
        self.found = set()

    def append(self, launch):
        if self.counts:
            compilation = emulation.compilation(launch)
            self.found.add((_is_half(launch), _digest(compilation)))


def _is_half(launch):
    return any(x.dtype == torch.float16 for x in emulation.tensors_of(launch.arguments.values()))


def _digest(compilation):
    return hashlib.blake2b(repr(compilation).encode(), digest_size=8).hexdigest()


class CompilationCounter:
    """The plugin of one process; of pytest-xdist's several processes the first adds up."""

    def __init__(self):
        self.launches = _Launches()
        self.of_workers = set()
        self.sampled = set()
        self.cases = 0
        self.outside = None

    def pytest_sessionstart(self):
        self.outside = triton_runtime._recorded
        triton_runtime._recorded = triton_runtime._Recorded(self.launches, runs=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        chosen = [x for x in case_sample.sample(items, gpu.CASES_OF_A_KIND) if _on_a_gpu(x)]
        self.sampled = {item.nodeid for item in chosen}
        self.cases = sum(2 if _stands_for_bfloat16(item) else 1 for item in chosen)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.launches.counts = item.nodeid in self.sampled
        try:
            return (yield)
        finally:
            self.launches.counts = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        found, cases = node.workeroutput.get("compilations", ((), 0))
        self.of_workers |= set(map(tuple, found))
        self.cases = max(self.cases, cases)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        triton_runtime._recorded = self.outside
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["compilations"] = sorted(self.launches.found), self.cases
        elif self.faults() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        found = f"{self.compilations} compilations by Triton in {self.cases} cases"
        terminalreporter.line(f"what `make gpu` would run of these tests: {found}")
        for fault in self.faults():
            terminalreporter.line(f"FAILED: {fault}", red=True)

    @property
    def compilations(self):
        """How many forms of kernels Triton would compile, of all processes."""
        return sum(2 if half else 1 for half, _ in self.launches.found | self.of_workers)

    def faults(self):
        """What benchmarks/gpu.py reckons with too little of, in words."""
        counted = {"TEST_COMPILATIONS": self.compilations, "TEST_CASES": self.cases}
        return [
            f"{name} in benchmarks/gpu.py: expected at least {number}, got {getattr(gpu, name)}"
            for name, number in counted.items()
            if number > getattr(gpu, name)
        ]


def _on_a_gpu(item):
    """Whether a GPU has the case too: what runs in C++ runs on a CPU alone."""
    given = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return isinstance(given, tuple) and given[1] != "cpp"


def _stands_for_bfloat16(item):
    parameters = item.callspec.params
    return parameters["device"][1] == "triton" and parameters.get("dtype") == torch.float16
