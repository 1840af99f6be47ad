"""A case is one op at one shape; its providers are checked against a reference, then timed."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.benchmarks.harness import ceilings, labels, records, timing
from adatape_kernels.benchmarks.harness.labels import ANY_BACKEND
from adatape_kernels.benchmarks.harness.records import CaseKey, ResultRow
from adatape_kernels.ops.device_facts import here
from adatape_kernels.ops.dual_ffn.products import recorded_forms
from adatape_kernels.ops.op import (
    BACKENDS,
    NotServed,
    Ran,
    operation,
    record,
    serving,
    use_backend,
)
from adatape_kernels.recipes.compiled_code import kept_by_instructions
from adatape_kernels.recipes.measure import Run

OURS = "ours"
GRAPH = " [graph]"
"""This ends the name of a provider that runs as a CUDA graph."""

MAX_SETS = 8
"""No case rotates through more sets of inputs than this."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""A provider is wrong when a result's error, relative to the largest magnitude, is above this."""


class Skipped(Exception):
    """A provider cannot run here; the text says why."""


class Prepared(NamedTuple):
    """A provider that is ready to run on one set of inputs."""

    run: Run
    results: Callable[[Any], Sequence[Tensor]]
    """This brings what the run returned into the form of the reference's results."""
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """Whoever computes the op: we or a peer."""

    name: str
    prepare: Callable[[Any], Prepared]
    """This takes a set of inputs and is not timed. It raises Skipped where it cannot run."""
    backend: str | None = None
    """The backend that serves each call of our ops, ANY_BACKEND, or None for a peer.

    The provider runs once under the dispatcher's record, which has to agree.
    """
    compiled: bool = False
    """A provider that is compiled first takes up to minutes before it runs."""
    checked: bool = True
    """An anchor is not checked, since it computes something else of the same size."""
    graph: bool = True
    """On a GPU the provider is also timed as a CUDA graph."""


Agreement = Callable[[Sequence[Tensor], Sequence[Tensor], float], str | None]


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """Return None, or by how much results differ from the reference's."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"result {index} has the shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if not b.numel():
            continue
        error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        if not error <= tolerance * max(size, 1e-6):
            return f"result {index} is off by {error:.3g}, the largest magnitude is {size:.3g}"
    return None


@dataclass(frozen=True)
class BenchmarkCase:
    """One op at one shape, in one direction and dtype."""

    op: str
    direction: str
    dtype: torch.dtype
    shape: str
    device_type: str
    inputs: Callable[[], Any]
    """This makes a set of inputs from torch's generator."""
    reference: Callable[[Any], Sequence[Tensor]]
    providers: Sequence[Provider]
    flops: float
    bytes: float
    """The rotating sets of inputs together hold twice the last-level cache of these; once if quick.
    """
    measured_ops: Sequence[str] = ()
    """Each provider that is ours must have called these ops; the dispatcher's record tells."""
    tolerance: float = 0.0
    """Zero stands for the dtype's TOLERANCE."""
    agree: Agreement = agree
    peaks: bool = False
    """The rows tell the peak of memory if this is set."""
    sets: int | None = None
    """This many sets of inputs rotate, for an op whose intermediates fill any cache."""

    @property
    def key(self) -> CaseKey:
        """What the rows of the case begin with."""
        return CaseKey(self.op, self.direction, records.dtype_name(self.dtype), self.shape)


class Effort(NamedTuple):
    """How long a case is measured, and which providers take part."""

    rounds: int
    seconds: float
    """No new round of timing begins after this time."""
    quick: bool = False
    compiled: str = "yes"
    """Providers that are compiled take part: "yes", "no", or "only" they and ours."""
    providers: frozenset[str] = frozenset()
    """Only providers of these names take part; all if it is empty."""
    running: Callable[[str], None] = lambda name: None
    """This is told which provider runs from here on, and "" for what none of them does."""
    ended: Mapping[str, str] = MappingProxyType({})
    """What became of providers that have ended a process before; they do not run again."""

    def wants(self, provider: Provider) -> bool:
        """Return whether a provider takes part."""
        if self.providers:
            return provider.name in self.providers
        if provider.name == OURS or self.compiled == "yes":
            return True
        return provider.compiled == (self.compiled == "only")


def run(case: BenchmarkCase, effort: Effort) -> list[ResultRow]:
    """Check every wanted provider against the reference, time those that agree, return all rows."""
    with kept_by_instructions():
        return _run(case, effort)


def _run(case: BenchmarkCase, effort: Effort) -> list[ResultRow]:
    effort.running("")
    limits = ceilings.measured(case.device_type, case.dtype, effort.quick)
    if case.device_type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()  # A function may be recompiled a few times only, and cases are many.
    torch.manual_seed(0)
    sets = _input_sets(case, effort.quick)
    expected = [x.detach() for x in case.reference(sets[0])]
    attempts = [
        attempt
        for provider in filter(effort.wants, case.providers)
        for attempt in _attempts(case, provider, sets, expected, effort)
    ]
    timings = timing.interleaved(
        {each.name: each.runs for each in attempts if each.status == "ok"},
        case.device_type,
        rounds=effort.rounds,
        seconds=effort.seconds,
        running=effort.running,
    )
    return [
        records.row(
            case.key,
            each.name,
            case.device_type,
            status=each.status,
            note=each.note,
            timing=timings.get(each.name),
            flops=case.flops,
            moved=case.bytes,
            limit_s=limits.seconds(case.flops, case.bytes),
            peak_bytes=_peak_bytes(case, each, effort),
        )
        for each in attempts
    ]


def _input_sets(case: BenchmarkCase, quick: bool) -> list[Any]:
    """Make so many sets of inputs that their rotation passes through more than the cache."""
    cache = timing.cache_bytes(case.device_type)
    filling = math.ceil((1 if quick else 2) * cache / max(1, case.bytes))
    count = case.sets or min(MAX_SETS, filling)
    return [case.inputs() for _ in range(max(1, count))]


class Attempt(NamedTuple):
    """What became of a provider before anything was timed."""

    name: str
    status: str
    """This is one of `records.STATUSES`; only what is "ok" is timed."""
    note: str
    runs: list[Run]
    """There is a run for each set of inputs."""


def _peak_bytes(case: BenchmarkCase, attempt: Attempt, effort: Effort) -> int | None:
    if not case.peaks or attempt.status != "ok" or attempt.name.endswith(GRAPH):
        return None
    effort.running(attempt.name)
    return timing.peak_bytes(attempt.runs[0], case.device_type)


def _attempts(
    case: BenchmarkCase,
    provider: Provider,
    sets: Sequence[Any],
    expected: Sequence[Tensor],
    effort: Effort,
) -> Iterator[Attempt]:
    """Try a provider, and on a GPU its graph, unless that has ended a process before."""
    name, graph = provider.name, provider.name + GRAPH
    if name in effort.ended:
        yield Attempt(name, "failed", effort.ended[name], [])
        return
    lost = effort.ended.get(graph)
    effort.running(name)
    tried = dataclasses.replace(provider, graph=provider.graph and lost is None)
    for attempt in attempts_of(case, tried, sets, expected):
        yield attempt
        if case.device_type == "cuda":
            effort.running(graph)
    if lost is not None:
        yield Attempt(graph, "failed", lost, [])


def attempts_of(
    case: BenchmarkCase, provider: Provider, sets: Sequence[Any], expected: Sequence[Tensor]
) -> Iterator[Attempt]:
    """Try a provider, and on a GPU then its CUDA graph."""
    prepared: list[Prepared] = []

    def plain() -> list[Run]:
        prepared.extend(provider.prepare(inputs) for inputs in sets)
        return [each.run for each in prepared]

    def graph() -> list[Run]:
        return [timing.captured(each.run) for each in prepared]

    attempt = _attempt(case, provider, provider.name, plain, prepared, expected)
    yield attempt
    if attempt.status == "ok" and case.device_type == "cuda" and provider.graph:
        yield _attempt(case, provider, provider.name + GRAPH, graph, prepared, expected)


def _attempt(
    case: BenchmarkCase,
    provider: Provider,
    name: str,
    make: Callable[[], list[Run]],
    prepared: list[Prepared],
    expected: Sequence[Tensor],
) -> Attempt:
    """Run a provider once, under the dispatcher's record, and compare its results and its label."""
    try:
        with record() as ran, recorded_forms() as forms:
            runs = make()
            returned = runs[0]()
        found = [x.detach() for x in prepared[0].results(returned)]
        lie = labels.difference(ran, provider.backend, case.measured_ops)
        if lie is not None:
            return Attempt(name, "failed", lie, [])
        if provider.checked:
            fault = case.agree(found, expected, case.tolerance or TOLERANCE[case.dtype])
            if fault is not None:
                return Attempt(name, "wrong", fault, [])
        return Attempt(name, "ok", _note(provider, prepared[0], ran, forms), runs)
    except (Skipped, NotServed) as reason:
        return Attempt(name, "skipped", records.first_line(reason), [])
    except Exception as error:  # Whatever a peer does, the others are still measured.
        return Attempt(name, "failed", f"{type(error).__name__}: {records.first_line(error)}", [])


def _note(provider: Provider, prepared: Prepared, ran: Sequence[Ran], forms: Sequence[str]) -> str:
    """Say which backend served where the provider's name does not, and what the peer adds.

    Where Triton served `dual_ffn` it says in which form.
    """
    served = labels.served_by(ran) if provider.backend == ANY_BACKEND else ""
    return "; ".join(filter(None, [prepared.note, served, labels.in_forms(forms)]))


def ours(
    op: str,
    prepare: Callable[[Any], Prepared],
    device_type: str,
    dtype: torch.dtype,
    name: str = OURS,
    graph: bool = True,
) -> list[Provider]:
    """Return our provider, and one for each further backend that has a kernel for device and dtype.

    A backend that does not serve the shape says so in its row. Eager stands among the peers.
    """
    found = [Provider(name, prepare, ANY_BACKEND, graph=graph)]
    default = serving(op, device_type, dtype)
    for backend in BACKENDS[1:]:
        kernel = operation(op).implementations.get(backend)
        if backend == default or kernel is None:
            continue
        if kernel.refusal_by_device(here(device_type), dtype):
            continue
        found.append(with_backend(Provider(f"{name} {backend}", prepare, graph=graph), backend))
    return found


def own_kernels(name: str = OURS) -> list[str]:
    """Return every name that `ours` may give."""
    return [name, *(f"{name} {backend}" for backend in BACKENDS[1:])]


def with_backend(provider: Provider, backend: str) -> Provider:
    """Return the provider with our ops served by one backend, and labelled so."""

    def prepare(inputs: Any) -> Prepared:
        with use_backend(backend):
            each = provider.prepare(inputs)

        def forced() -> object:
            with use_backend(backend):
                return each.run()

        return each._replace(run=forced)

    return dataclasses.replace(provider, prepare=prepare, backend=backend)


def with_backward(op: str, backward: bool) -> list[str]:
    """Return an op's name, and that of its backward if it is measured too."""
    return [op, f"{op}_bwd"] if backward else [op]


def only_on_cuda(provider: Provider, device_type: str) -> Provider:
    """Return the provider, or on another device one that is skipped for that reason."""
    return provider if device_type == "cuda" else skipped(provider.name, "it runs on CUDA only")


def skipped(name: str, reason: str) -> Provider:
    """Return a provider that cannot run here."""

    def prepare(inputs: Any) -> Prepared:
        raise Skipped(reason)

    return Provider(name, prepare)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take."""
    return sum(x.numel() * x.element_size() for x in tensors)
