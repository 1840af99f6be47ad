"""Whether this machine computes what it should: every kernel beside float64, within minutes.

A kernel's error may be at most twice that of plain torch in the same dtype, both measured against
float64 on the same inputs; what is selected must be equal, an example's bits must not depend on its
batch, and NaN in foreign rows must not show. What each line says it checked is what the dispatcher
recorded to have run, and a kernel that no case reached is a failure.

Several processes may share the work. On a GPU nearly all of it is compiling Triton's kernels, which
takes one thread about a second each.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.arguments import check_int
from adatape_kernels.ops import refusal_probe
from adatape_kernels.ops.device_facts import here
from adatape_kernels.ops.implementation import FLOAT_DTYPES, short
from adatape_kernels.ops.op import (
    BACKENDS,
    NotServed,
    Ran,
    operation,
    record,
    registered_ops,
    use_backend,
    why_absent,
)
from adatape_kernels.recipes.check_cases import CheckCase, check_cases, layout_of
from adatape_kernels.recipes.check_jobs import in_processes
from adatape_kernels.recipes.check_model import elastic_as_padded, in_a_cuda_graph
from adatape_kernels.recipes.devices import chosen_device, device_name
from adatape_kernels.recipes.full_precision import without_tf32

FLOOR = 2e-6
"""Error that is allowed beside twice that of plain torch, relative to the largest magnitude."""

KERNEL_BACKENDS = BACKENDS[1:]
"""The backends that are checked, against the first one."""


class Finding(NamedTuple):
    """What one check found."""

    name: str
    """Op, case, backend and dtype."""
    fault: str | None
    """None when it passed."""


class Kernel(NamedTuple):
    """An implementation in one dtype."""

    op: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} {short(self.dtype)}"


class Outcome(NamedTuple):
    """What one unit of the work found, and the kernels that ran in it."""

    finding: Finding | None
    """None where the kernel does not serve the unit's calls."""
    reached: frozenset[Kernel]


Unit = Callable[[], Outcome]
"""One check of one kernel, or of a model; units depend on nothing that others did."""


def run(device: str, jobs: int = 1) -> bool:
    """Check every kernel that serves on the device, print a line for each, and the verdict.

    Args:
        device: "cpu", "cuda", or a GPU by its number, as in "cuda:1".
        jobs: so many processes share the work. Most of it on a GPU is compiling, by one thread.

    Returns:
        Whether all passed.

    Raises:
        ValueError: there is no such device, or no job.
        RuntimeError: no kernel but the eager reference serves there.
    """
    where = chosen_device(device)
    device = "cpu" if where.type == "cpu" else str(where)
    check_int("jobs", jobs, 1)
    start, passed, faults = time.perf_counter(), 0, 0
    machine = platform.machine() if where.type == "cpu" else device_name(where)
    with prepared(device), torch.random.fork_rng():
        for name, fault in findings(device, jobs):
            print(f"{name:88} {'ok' if fault is None else 'FAILED: ' + fault}", flush=True)
            passed, faults = passed + (fault is None), faults + (fault is not None)
    if not passed + faults:
        raise RuntimeError(f"check: expected a kernel that serves {device}, got only eager")
    seconds = time.perf_counter() - start
    if faults:
        print(f"{machine}: results can NOT be trusted, {faults} of {passed + faults} checks failed")
    else:
        print(f"{machine}: results can be trusted, {passed} checks passed in {seconds:.0f} s")
    return not faults


@contextlib.contextmanager
def prepared(device: str) -> Iterator[None]:
    """Make what is made on this device, and let torch's own products have float32's accuracy."""
    with contextlib.ExitStack() as stack:
        if device != "cpu":  # streams and graphs are those of the current GPU
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.device(device))
        stack.enter_context(without_tf32())
        yield


def findings(device: str, jobs: int = 1) -> Iterator[Finding]:
    """Run every check on the device, which must be torch's default."""
    every = units(device)
    reached: set[Kernel] = set()
    if any(kernel.backend in ("cpp", "cuda") for kernel in _kernels(device)):
        yield Finding("errors raised in C++ reach Python", refusal_probe.fault())
    outcomes: Iterator[Outcome | None] = map(outcome_of, every)
    if jobs > 1:
        outcomes = in_processes(_prepare_process, _run_unit, device, len(every), jobs)
    for number, outcome in enumerate(outcomes, start=1):
        if outcome is None:
            yield Finding(f"check {number} of {len(every)}", "its process has died")
            continue
        reached |= outcome.reached
        if outcome.finding is not None:
            yield outcome.finding
    for kernel in _kernels(device):
        if kernel not in reached:
            yield Finding(f"{kernel.op}, {kernel}", "no case reached it")


# Of a process that shares the work.
_process_units: list[Unit] = []
_process_context = contextlib.ExitStack()


def _prepare_process(device: str) -> None:
    """Make a process ready: it lists the same units as the one that has started it."""
    _process_context.enter_context(prepared(device))
    _process_units.extend(units(device))


def _run_unit(number: int) -> Outcome:
    return outcome_of(_process_units[number])


def outcome_of(unit: Unit) -> Outcome:
    """Run a unit, whose draws are the same in whichever process and order it runs."""
    torch.manual_seed(0)
    return unit()


def units(device: str) -> list[Unit]:
    """Return every unit of the work on a device, in the same order in every process."""
    found: list[Unit] = []
    kernels = list(_kernels(device))
    for case in check_cases():
        found += _of_each_kernel(kernels, case.op, case.name, _accuracy, case)
    for op, alone in (
        ("tape_select", _select_alone),
        ("tape_gather", _gather_alone),
        ("elastic_attention", _attention_alone),
    ):
        name = "alone as in its batch, beside NaN"
        found += _of_each_kernel(kernels, op, name, _invariance, alone)
    for backend in KERNEL_BACKENDS:
        if any(kernel.backend == backend for kernel in kernels):
            found.append(partial(_check_model, "elastic as padded", elastic_as_padded, backend))
            if device != "cpu":
                found.append(partial(_check_model, "in a CUDA graph", in_a_cuda_graph, backend))
    return found


def _kernels(device: str) -> Iterator[Kernel]:
    """Yield what is there to be checked: this device's implementations, in each of their dtypes."""
    for op in registered_ops():
        for backend in KERNEL_BACKENDS:
            given = operation(op).implementations.get(backend)
            for dtype in FLOAT_DTYPES:
                if given is None:
                    continue
                if given.refusal_by_device(here(device), dtype) is None:
                    yield Kernel(op, backend, dtype)


def _of_each_kernel(
    kernels: Sequence[Kernel],
    op: str,
    name: str,
    check: Callable[..., str | None],
    subject: object,
) -> list[Unit]:
    """Return a check of each kernel of an op."""
    own = [kernel for kernel in kernels if kernel.op == op]
    return [partial(_check_kernel, kernel, name, check, subject) for kernel in own]


def _check_kernel(
    kernel: Kernel, name: str, check: Callable[..., str | None], subject: object
) -> Outcome:
    with record() as ran:
        try:
            fault = _fault(check, subject, kernel.backend, kernel.dtype)
        except NotServed:
            return Outcome(None, frozenset())
    kin = (kernel.op, f"{kernel.op}_", f"{kernel.op}_bwd")
    own = [e for e in ran if e.op in kin]
    reached = (kernel._replace(op=e.op) for e in own if e.backend == kernel.backend)
    return Outcome(Finding(f"{kernel.op}, {name}, {kernel}", fault), frozenset(reached))


def _names(ran: list[Ran]) -> str:
    return " and ".join(sorted({entry.backend for entry in ran})) or "nothing"


def _check_model(name: str, check: Callable[..., str | None], backend: str) -> Outcome:
    """Check a model under a backend, and name what took the ops that the backend does not serve."""
    fallback = [b for b in ("triton", "eager") if b != backend and why_absent(b) is None]
    with record() as ran:
        fault = _fault(check, backend, fallback)
    others = sorted({entry.backend for entry in ran} - {backend})
    beside = f" and {', '.join(others)}" if others else ""
    return Outcome(Finding(f"model, {name}, {backend}{beside} float32", fault), frozenset())


def _fault(check: Callable[..., str | None], *arguments: object) -> str | None:
    """Run a check; an error is its fault, and the next check still runs.

    Raises:
        NotServed: the kernel states that it does not serve the check's calls.
    """
    try:
        return check(*arguments)
    except NotServed:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# Accuracy


def _accuracy(case: CheckCase, backend: str, dtype: torch.dtype) -> str | None:
    given = [x.to(dtype) for x in case.inputs()]
    ours, chosen = _evaluate(case, given, backend)
    plain, _ = _evaluate(case, given, "eager")
    exact, expected = _evaluate(case, [x.double() for x in given], "eager")
    for ours_chosen, expected_chosen in zip(chosen, expected, strict=True):
        if not torch.equal(ours_chosen, expected_chosen):
            return "it selects otherwise than float64"
    for index, (a, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = ((x.double() - e).abs().max().item() if e.numel() else 0 for x in (a, p))
        limit = 2 * allowed + FLOOR * max(1.0, e.abs().max().item() if e.numel() else 0)
        if not error <= limit:
            return f"error {error:.1e} of result {index}, allowed {limit:.1e}"
    return None


def _evaluate(
    case: CheckCase, inputs: list[Tensor], backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients, and what must be equal."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use_backend(backend), _deterministic(case.deterministic), _ran_by(backend):
        results, equal = case.call(*leaves)
        generator = torch.Generator(leaves[0].device).manual_seed(1)
        cotangents = [
            torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)
            for x in results
        ]
        grads = torch.autograd.grad(results, leaves, cotangents)
    return [x.detach() for x in (*results, *grads)], list(equal)


@contextlib.contextmanager
def _ran_by(backend: str) -> Iterator[None]:
    """Fail if any other backend serves a call."""
    with record() as ran:
        yield
    if {entry.backend for entry in ran} != {backend}:
        raise RuntimeError(f"{_names(ran)} ran in the place of {backend}")


@contextlib.contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    """Ask torch for deterministic algorithms, or for any."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# An example's bits, in company and alone


def _invariance(
    alone: Callable[[torch.dtype, int | None], list[Tensor]], backend: str, dtype: torch.dtype
) -> str | None:
    with use_backend(backend), _ran_by(backend):
        together = alone(dtype, None)
        single = alone(dtype, 1)
    for a, b in zip(together, single, strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()) or a.isnan().any():
            return "an example's bits depend on its batch"
    return None


def _select_alone(dtype: torch.dtype, only: int | None) -> list[Tensor]:
    """Example 1 of 4, whose mates' banks are NaN, and alone."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    query = torch.randn(4, 32, generator=generator).to(dtype)
    keys = torch.randn(4, 300, 32, generator=generator).to(dtype)
    keys[[0, 2, 3]] = torch.nan
    chosen = slice(None) if only is None else slice(only, only + 1)
    query, keys = (x[chosen].clone().requires_grad_() for x in (query, keys))
    selection = ops.tape_select(query, keys, num_tape_tokens=5, topk=4, halt_threshold=2.0)
    own = 1 if only is None else 0
    objective = selection.weights[own].square().sum() + selection.ponder[own]
    grads = torch.autograd.grad(objective, (query, keys))
    return [x.detach()[own] for x in (selection.weights, selection.ponder, *grads)]


def _gather_alone(dtype: torch.dtype, only: int | None) -> list[Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    bank = torch.randn(4, 100, 56, generator=generator).to(dtype)
    weights = torch.rand(4, 5, 3, generator=generator)
    indices = torch.arange(4 * 5 * 3, dtype=torch.int32).view(4, 5, 3) % 100
    bank[[0, 2, 3]] = torch.nan
    chosen = slice(None) if only is None else slice(only, only + 1)
    bank, weights = (x[chosen].clone().requires_grad_() for x in (bank, weights))
    counts = torch.tensor([5, 3, 0, 4], dtype=torch.int32)[chosen]
    tape, offsets = ops.tape_gather(bank, indices[chosen], weights, counts)
    own = 1 if only is None else 0
    start = int(offsets[own])
    tape = tape[start : start + 3]
    grads = torch.autograd.grad(tape.float().square().sum(), (bank, weights))
    return [tape.detach(), *(x[own] for x in grads)]


def _attention_alone(dtype: torch.dtype, only: int | None) -> list[Tensor]:
    input_lens, tape_lens = [90, 201, 0, 33], [4, 6, 2, 0]
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    data = torch.full((sum(input_lens) + sum(tape_lens), 3, 2, 64), torch.nan)
    own = torch.cat([torch.arange(90, 291), torch.arange(324 + 4, 324 + 10)])
    data[own] = torch.randn(207, 3, 2, 64, generator=generator)
    if only is not None:
        data, input_lens, tape_lens = data[own], [201], [6]
        own = torch.arange(207)
    leaf = data.to(dtype).requires_grad_()
    q, k, v = leaf.unbind(1)
    out = ops.elastic_attention(q, k, v, *layout_of(input_lens, tape_lens), max_rows=207)[own]
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    return [out.detach(), grad[own]]
