"""Counts, without a GPU, what Triton would compile in a run of tests on one.

    cd tests && python -m pytest -p count_compilations -n 0 -k "cpu-triton or cpu-None" .

A plugin of pytest: the kernels run in triton's interpreter, and each launch is noted by what Triton
would compile it for (`emulation.compilation`). The interpreter has no bfloat16, which takes as many
compilations as float16, so that those of float16 count twice. The sum is what TEST_COMPILATIONS in
benchmarks/gpu.py reckons with. Launches within a `recording` of the test's own are not counted.
"""

import contextlib

import emulation
import torch

from adatape_kernels.ops import triton_runtime


class _Counted(list):
    """Stands in for the launches of a `recording` that runs them; keeps none of them."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def append(self, launch):
        dtypes = {x.dtype for x in _tensors(launch.arguments.values())}
        self.found.add((torch.float16 in dtypes, emulation.compilation(launch)))

    @property
    def number(self):
        return sum(2 if half else 1 for half, _ in self.found)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


_counted = _Counted()
_stack = contextlib.ExitStack()


def pytest_sessionstart():
    recorded = _stack.enter_context(triton_runtime.recording(run=True))
    assert not recorded
    triton_runtime._recorded = triton_runtime._recorded._replace(launches=_counted)


def pytest_sessionfinish():
    _stack.close()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"compilations by Triton on a GPU: {_counted.number}")
