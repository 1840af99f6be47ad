"""A case: one op at one shape, what it needs, and who provides it; checked first, then timed."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ceilings
import records
import timing
import torch
from adatape_kernels.backend import BACKENDS, explain, serving, use_backend
from torch import Tensor

from adatape_kernels.recipes.measure import Run

OURS = "ours"
GRAPH = " [graph]"
"""Behind the name of a provider that runs as a CUDA graph."""

MAX_SETS = 8
"""Most sets of inputs in rotation."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Error of a result, relative to its largest magnitude, above which a provider is wrong."""


class Skipped(Exception):
    """A provider is not to be had here; the text says why."""


class Prepared(NamedTuple):
    """A provider ready to run on one set of inputs."""

    run: Run
    results: Callable[[Any], Sequence[Tensor]]
    """Brings what the run returned into the form of the reference's results."""
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """Someone who computes the op: ours or a peer."""

    name: str
    prepare: Callable[[Any], Prepared]
    """Takes a set of inputs; what it does is not timed. Raises Skipped."""
    compiled: bool = False
    """It has to be compiled first, which takes up to minutes."""
    checked: bool = True
    """False for an anchor, which computes something else of the same size."""
    graph: bool = True
    """Whether, on a GPU, it is also timed as a CUDA graph."""


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
class Case:
    """One op at one shape, in one direction and dtype."""

    op: str
    direction: str
    dtype: torch.dtype
    shape: str
    device_type: str
    inputs: Callable[[], Any]
    """Makes a set of inputs from torch's generator."""
    reference: Callable[[Any], Sequence[Tensor]]
    providers: Sequence[Provider]
    flops: float
    bytes: float
    """As many sets of inputs rotate as make twice the last-level cache of these; quick: once."""
    tolerance: float = 0.0
    agree: Agreement = agree
    peaks: bool = False
    """Whether the rows tell the peak of memory."""
    sets: int | None = None
    """Sets of inputs instead of so many, where the op's own intermediates fill any cache."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.direction, str(self.dtype).removeprefix("torch."), self.shape


class Effort(NamedTuple):
    """How long to measure, and which providers."""

    rounds: int
    seconds: float
    """Of one case's timing."""
    quick: bool = False
    compiled: str = "yes"
    """Whether providers that have to be compiled take part: yes, no or only (they and ours)."""
    providers: frozenset[str] = frozenset()
    """Names; empty for all."""

    def wants(self, provider: Provider) -> bool:
        ours = provider.name == OURS
        if self.providers:
            return provider.name in self.providers
        return ours or self.compiled == "yes" or provider.compiled == (self.compiled == "only")


def run(case: Case, effort: Effort) -> list[records.Row]:
    """Check every wanted provider against the reference, time those that agree, return all rows."""
    limits = ceilings.measured(case.device_type, case.dtype, effort.quick)
    if case.device_type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()  # a function's recompilations are few, and cases many
    torch.manual_seed(0)
    sets = [case.inputs()]
    cache = timing.cache_bytes(case.device_type)
    caches = 1 if effort.quick else 2
    wanted = case.sets or min(MAX_SETS, math.ceil(caches * cache / max(1, case.bytes)))
    sets += [case.inputs() for _ in range(wanted - 1)]
    expected = [x.detach() for x in case.reference(sets[0])]
    ready: dict[str, list[Run]] = {}
    states: dict[str, tuple[str, str]] = {}
    for provider in filter(effort.wants, case.providers):
        for name, turns, status, note in _attempts(case, provider, sets, expected):
            states[name] = status, note
            if status == "ok":
                ready[name] = turns
    timings = timing.interleaved(
        ready, case.device_type, rounds=effort.rounds, seconds=effort.seconds
    )
    return [
        records.row(
            case.key,
            name,
            case.device_type,
            status=status,
            note=note,
            timing=timings.get(name),
            flops=case.flops,
            moved=case.bytes,
            limit_s=limits.seconds(case.flops, case.bytes),
            peak_bytes=timing.peak_bytes(ready[name][0], case.device_type)
            if case.peaks and name in ready and not name.endswith(GRAPH)
            else None,
        )
        for name, (status, note) in states.items()
    ]


def _attempts(
    case: Case, provider: Provider, sets: Sequence[Any], expected: Sequence[Tensor]
) -> Iterator[tuple[str, list[Run], str, str]]:
    """Yield name, runs, status and note of a provider, and on a GPU of its CUDA graph."""
    prepared: list[Prepared] = []

    def plain() -> list[Run]:
        prepared.extend(provider.prepare(inputs) for inputs in sets)
        return [each.run for each in prepared]

    def graph() -> list[Run]:
        return [timing.captured(each.run) for each in prepared]

    name, status = provider.name, "ok"
    for make in (plain, graph):
        turns, status, note = _attempt(case, provider, make, prepared, expected)
        yield name, turns, status, note
        if status != "ok" or case.device_type != "cuda" or not provider.graph:
            return
        name = provider.name + GRAPH


def _attempt(
    case: Case,
    provider: Provider,
    make: Callable[[], list[Run]],
    prepared: list[Prepared],
    expected: Sequence[Tensor],
) -> tuple[list[Run], str, str]:
    try:
        turns = make()
        found = prepared[0].results(turns[0]())
        if provider.checked:
            tolerance = case.tolerance or TOLERANCE[case.dtype]
            fault = case.agree([x.detach() for x in found], expected, tolerance)
            if fault is not None:
                return [], "wrong", fault
        return turns, "ok", prepared[0].note
    except Skipped as reason:
        return [], "skipped", str(reason)
    except Exception as error:  # whatever a peer does, the others are still measured
        return [], "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def ours(
    op: str,
    prepare: Callable[[Any], Prepared],
    device_type: str,
    dtype: torch.dtype,
    name: str = OURS,
    graph: bool = True,
) -> list[Provider]:
    """Return our provider, and one for each other kernel of ours that serves; eager is a peer."""
    found = [Provider(name, prepare, graph=graph)]
    default = serving(op, device_type, dtype)
    for backend, reason in explain(op, device_type, dtype).items():
        if backend in BACKENDS[1:] and backend != default and reason == "serves":
            one = Provider(f"{name} {backend}", prepare, graph=graph)
            found.append(with_backend(one, backend))
    return found


def own_kernels(name: str = OURS) -> list[str]:
    """Return every name that `ours` may give."""
    return [name, *(f"{name} {backend}" for backend in BACKENDS[1:])]


def with_backend(provider: Provider, backend: str) -> Provider:
    """Return the provider with our ops served by one backend."""

    def prepare(inputs: Any) -> Prepared:
        with use_backend(backend):
            each = provider.prepare(inputs)

        def forced() -> object:
            with use_backend(backend):
                return each.run()

        return each._replace(run=forced)

    return dataclasses.replace(provider, prepare=prepare)


def only_on_cuda(provider: Provider, device_type: str) -> Provider:
    """Return the provider, or on another device one that is skipped for that reason."""
    return provider if device_type == "cuda" else skipped(provider.name, "it runs on CUDA only")


def skipped(name: str, reason: str) -> Provider:
    """Return a provider that is not to be had."""

    def prepare(inputs: Any) -> Prepared:
        raise Skipped(reason)

    return Provider(name, prepare)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take."""
    return sum(x.numel() * x.element_size() for x in tensors)
