"""Whether this machine computes what it should: every kernel beside float64, within minutes.

A kernel's error may be at most twice that of plain torch in the same dtype, both measured against
float64 on the same inputs; what is selected must be equal, an example's bits must not depend on its
batch, and NaN in foreign rows must not show. What each line says it checked is what the dispatcher
recorded to have run, and a kernel that no case reached is a failure.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.models import AdaTapeViT, adatape_vit
from adatape_kernels.models.value_checks import as_choice
from adatape_kernels.ops import refusal_probe
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


def run(device: str) -> bool:
    """Check every kernel that serves on the device, print a line for each, and the verdict.

    Returns:
        Whether all passed.

    Raises:
        ValueError: the device is neither "cpu" nor "cuda".
        RuntimeError: no kernel but the eager reference serves there.
    """
    as_choice("device", device, ("cpu", "cuda"))
    start, passed, faults = time.perf_counter(), 0, 0
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, fault in findings(device):
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


class Kernel(NamedTuple):
    """An implementation in one dtype."""

    op: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} {short(self.dtype)}"


def findings(device: str) -> Iterator[Finding]:
    """Run every check on the device, which must be torch's default."""
    reached: set[Kernel] = set()
    if any(kernel.backend in ("cpp", "cuda") for kernel in _kernels(device)):
        yield Finding("errors raised in C++ reach Python", refusal_probe.fault())
    for case in check_cases():
        yield from _each_kernel(case.op, case.name, device, reached, _accuracy, case)
    for op, alone in (
        ("tape_select", _select_alone),
        ("tape_gather", _gather_alone),
        ("elastic_attention", _attention_alone),
    ):
        name = "alone as in its batch, beside NaN"
        yield from _each_kernel(op, name, device, reached, _invariance, alone)
    for backend in KERNEL_BACKENDS:
        if any(kernel.backend == backend for kernel in reached):
            yield _model_finding("elastic as padded", _model, backend)
            if device == "cuda":
                yield _model_finding("in a CUDA graph", _graph, backend)
    for kernel in _kernels(device):
        if kernel not in reached:
            yield Finding(f"{kernel.op}, {kernel}", "no case reached it")


def _kernels(device: str) -> Iterator[Kernel]:
    """Yield what is there to be checked: this device's implementations, in each of their dtypes."""
    for op in registered_ops():
        for backend in KERNEL_BACKENDS:
            given = operation(op).implementations.get(backend)
            for dtype in FLOAT_DTYPES:
                if given is not None and given.refusal_by_type(device, dtype) is None:
                    yield Kernel(op, backend, dtype)


def _each_kernel(
    op: str,
    name: str,
    device: str,
    reached: set[Kernel],
    check: Callable[..., str | None],
    subject: object,
) -> Iterator[Finding]:
    """Run a check on each kernel of an op that serves the calls of the check."""
    for kernel in _kernels(device):
        if kernel.op != op:
            continue
        with record() as ran:
            try:
                fault = _fault(check, subject, kernel.backend, kernel.dtype)
            except NotServed:
                continue
        both = [entry for entry in ran if entry.op in (op, f"{op}_bwd")]
        reached |= {kernel._replace(op=e.op) for e in both if e.backend == kernel.backend}
        yield Finding(f"{op}, {name}, {kernel}", fault)


def _names(ran: list[Ran]) -> str:
    return " and ".join(sorted({entry.backend for entry in ran})) or "nothing"


def _model_finding(name: str, check: Callable[..., str | None], backend: str) -> Finding:
    """Check a model under a backend, and name what took the ops that the backend does not serve."""
    fallback = [b for b in ("triton", "eager") if b != backend and why_absent(b) is None]
    with record() as ran:
        fault = _fault(check, backend, fallback)
    others = sorted({entry.backend for entry in ran} - {backend})
    beside = f" and {', '.join(others)}" if others else ""
    return Finding(f"model, {name}, {backend}{beside} float32", fault)


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


# A whole model


def _vit() -> AdaTapeViT:
    torch.manual_seed(6)
    return adatape_vit(
        "Ti/4",
        image_size=16,
        dim=64,
        depth=2,
        num_heads=2,
        ffn_dim=128,
        bank_patch_size=2,
        num_tape_tokens=5,
        topk=3,
        num_classes=10,
    )


def _model(backend: str, fallback: list[str]) -> str | None:
    """The same logits and gradients as the padded, masked, eager model."""
    model = _vit()
    images = torch.randn(6, 3, 16, 16)
    with use_backend(backend, fallback):
        ours = _logits_and_gradients(model, images)
    with use_backend("eager"):
        theirs = _logits_and_gradients(model.padded(), images)
    for a, b in zip(ours, theirs, strict=True):
        if not (a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item()):
            return f"it differs by {(a - b).abs().max().item():.1e}"
    return None


def _logits_and_gradients(model: torch.nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(images).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _graph(backend: str, fallback: list[str]) -> str | None:
    """A step in capacity mode, captured once, replayed on other images."""
    model = _vit()
    images, others = torch.randn(2, 6, 3, 16, 16)
    static = images.clone()

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        logits = model(static, capacity=30).logits
        logits.square().sum().backward()
        return logits

    with use_backend(backend, fallback), contextlib.ExitStack() as stack:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        stack.enter_context(torch.cuda.stream(stream))
        for _ in range(2):
            step()
        stack.close()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        static.copy_(others)
        graph.replay()
        replayed = [
            logits.clone(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
        expected = _logits_and_gradients(model, others)
    for a, b in zip(replayed, expected, strict=True):
        if not (a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item()):
            return f"the replayed step differs by {(a - b).abs().max().item():.1e}"
    return None
