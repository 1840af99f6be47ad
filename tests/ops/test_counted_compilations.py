"""What a run of the tests counts for `make gpu`, and that too small a number there is a failure."""

from types import SimpleNamespace

import emulation
import pytest
import small_calls
import torch

from adatape_kernels.benchmarks import gpu
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import operation

pytest.importorskip("triton")
from compiled_forms import forms_of
from count_compilations import CompilationCounter

OPS = [op for op in small_calls.OPS if "triton" in operation(op).implementations]


def recorded(launches, run=True):
    """A counter in the middle of a run in which a case has launched these."""
    counter = CompilationCounter()
    counter.outside = triton_runtime._recorded
    counter.launches.counts = run
    for launch in launches:
        counter.launches.append(launch)
    return counter


def launches_of(op, dtype):
    with triton_runtime.recording() as launches:
        for own_banks in (True, False) if "tape" in op else (True,):
            args = small_calls.call_of(op, dtype, own_banks=own_banks)
            operation(op).implementations["triton"].function(*args)
    return launches


@pytest.mark.parametrize("op", OPS)
def test_a_compilation_is_what_triton_compiles(op):
    launches = [x for dtype in (torch.float32, torch.float16) for x in launches_of(op, dtype)]
    pairs = {(str(forms_of([x])), repr(emulation.compilation(x))) for x in launches}
    assert launches and len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_half_precision_counts_twice():
    """For bfloat16, which the interpreter lacks."""
    full = recorded(launches_of("compact_rows_bwd", torch.float32))
    half = recorded(launches_of("compact_rows_bwd", torch.float16))
    assert (full.compilations, half.compilations) == (1, 2)
    assert recorded(launches_of("compact_rows_bwd", torch.float16), run=False).compilations == 0


@pytest.mark.parametrize("name", ["TEST_COMPILATIONS", "TEST_CASES"])
def test_a_run_with_more_than_is_reckoned_with_fails(monkeypatch, name):
    counter = recorded(launches_of("tape_gather", torch.float32))
    counter.cases = counter.compilations
    for enough in (True, False):
        monkeypatch.setattr(gpu, name, counter.compilations - (not enough))
        session = SimpleNamespace(config=SimpleNamespace(), exitstatus=pytest.ExitCode.OK)
        counter.pytest_sessionfinish(session)
        assert (session.exitstatus == pytest.ExitCode.OK) == enough
        assert [name in fault for fault in counter.faults()] == ([] if enough else [True])


def test_several_processes_are_added_up():
    counters = [recorded(launches_of("tape_gather", d)) for d in (torch.float32, torch.float16)]
    first = CompilationCounter()
    for counter in (*counters, counters[0]):
        config = SimpleNamespace(workeroutput={})
        counter.pytest_sessionfinish(SimpleNamespace(config=config))
        first.pytest_testnodedown(SimpleNamespace(workeroutput=config.workeroutput))
    # The offsets take the same kernel for both dtypes.
    assert [x.compilations for x in (*counters, first)] == [2, 3, 4]
