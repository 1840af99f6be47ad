"""Whether this machine computes what it should: every kernel beside float64, within minutes.

A kernel's error may be at most twice that of plain torch in the same dtype, both measured against
float64 on the same inputs; what is selected must be equal, an example's bits must not depend on its
batch, and NaN in foreign rows must not show.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.elastic import cumulative
from adatape_kernels.models import AdaTapeViT, adatape_vit
from adatape_kernels.ops import FFN
from adatape_kernels.ops.op import BACKENDS, FLOAT_DTYPES, explain, use_backend

FLOOR = 2e-6
"""Error that is allowed beside twice that of plain torch, relative to the largest magnitude."""

Results = tuple[Sequence[Tensor], Sequence[Tensor]]


class Case(NamedTuple):
    """An op at one shape."""

    op: str
    name: str
    inputs: Callable[[], list[Tensor]]
    """Makes the differentiable inputs, float32 on the default device."""
    call: Callable[..., Results]
    """Returns the differentiable results, and those that must be equal."""


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
        RuntimeError: no kernel but the eager reference serves there.
    """
    start, passed, faults = time.perf_counter(), 0, 0
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, fault in findings(device):
            print(f"{name:74} {'ok' if fault is None else 'FAILED: ' + fault}", flush=True)
            passed, faults = passed + (fault is None), faults + (fault is not None)
    if not passed + faults:
        raise RuntimeError(f"check: expected a kernel that serves {device}, got only eager")
    seconds = time.perf_counter() - start
    if faults:
        print(f"{machine}: results can NOT be trusted, {faults} of {passed + faults} checks failed")
    else:
        print(f"{machine}: results can be trusted, {passed} checks passed in {seconds:.0f} s")
    return not faults


def findings(device: str) -> Iterator[Finding]:
    """Run every check on the device, which must be torch's default."""
    for case in _cases():
        for backend, dtype in _kernels(case.op, device):
            label = f"{case.op}, {case.name}, {backend} {_short(dtype)}"
            yield Finding(label, _fault(_accuracy, case, backend, dtype))
    for op, alone in (
        ("tape_select", _select_alone),
        ("tape_gather", _gather_alone),
        ("elastic_attention", _attention_alone),
    ):
        for backend, dtype in _kernels(op, device):
            label = f"{op}, alone as in its batch, beside NaN, {backend} {_short(dtype)}"
            yield Finding(label, _fault(_invariance, alone, backend, dtype))
    for backend, dtype in _kernels("elastic_attention", device):
        if dtype == torch.float32:
            yield Finding(f"model, elastic as padded, {backend}", _fault(_model, backend))
    if device == "cuda":
        for backend, dtype in _kernels("elastic_attention", device):
            if dtype == torch.float32:
                label = f"model, in a CUDA graph, {backend}"
                yield Finding(label, _fault(_graph, backend))


def _kernels(op: str, device: str) -> Iterator[tuple[str, torch.dtype]]:
    for backend in BACKENDS[1:]:
        for dtype in FLOAT_DTYPES:
            if explain(op, device, dtype)[backend] == "serves":
                yield backend, dtype


def _fault(check: Callable[..., str | None], *arguments: object) -> str | None:
    """Run a check; an error of any kind is its fault, and the next check still runs."""
    try:
        return check(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# Accuracy


def _accuracy(case: Case, backend: str, dtype: torch.dtype) -> str | None:
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


def _evaluate(case: Case, inputs: list[Tensor], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients, and what must be equal."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use_backend(backend):
        results, equal = case.call(*leaves)
        generator = torch.Generator(leaves[0].device).manual_seed(1)
        cotangents = [
            torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)
            for x in results
        ]
        grads = torch.autograd.grad(results, leaves, cotangents)
    return [x.detach() for x in (*results, *grads)], list(equal)


def _cases() -> Iterator[Case]:
    for bank, batch, size, key_dim, topk, steps in (
        ("input-driven", 8, 784, 64, 5, 10),
        ("input-driven", 5, 75, 24, 1, 4),
        ("input-driven", 2, 3000, 40, 32, 6),
        ("learnable", 20, 2500, 64, 5, 10),
        ("learnable", 3, 20000, 64, 8, 4),
    ):
        yield _select_case(bank, batch, size, key_dim, topk, steps)
    for bank, batch, size, dim, capacity in (
        ("input-driven", 8, 784, 384, None),
        ("input-driven", 3, 60, 50, 40),
        ("learnable", 20, 2500, 384, 130),
        ("learnable", 9, 30, 8, None),
    ):
        yield _gather_case(bank, batch, size, dim, capacity)
    for head_dim, lens in (
        (64, ([197, 50, 1, 0, 256, 64, 100], [10, 3, 0, 0, 0, 1, 28])),
        (32, ([17, 31, 0], [0, 2, 5])),
        (128, ([300, 80], [7, 0])),
        (24, ([130, 15, 16], [9, 0, 1])),
        (8, ([70, 1], [0, 4])),
        (64, ([1500, 3], [20, 2])),
    ):
        yield _attention_case(head_dim, *lens)
    for dim, hidden, tape_hidden, rows, inputs, end in (
        (384, 1536, 768, 500, 470, 490),
        (48, 100, 50, 77, 70, 77),
        (64, 256, 0, 130, 130, 130),
    ):
        for form in ("int", "tensor"):
            yield _ffn_case(dim, hidden, tape_hidden, rows, inputs, end, form)


def _select_case(bank: str, batch: int, size: int, key_dim: int, topk: int, steps: int) -> Case:
    shape = (size, key_dim) if bank == "learnable" else (batch, size, key_dim)

    def inputs() -> list[Tensor]:
        return [torch.randn(batch, key_dim), torch.randn(shape)]

    def call(query: Tensor, keys: Tensor) -> Results:
        selection = ops.tape_select(
            query, keys, num_tape_tokens=steps, topk=topk, halt_threshold=2.5
        )
        return (selection.weights, selection.ponder), (selection.indices, selection.counts)

    return Case("tape_select", f"{bank} bank of {size}, k = {topk}", inputs, call)


def _gather_case(bank: str, batch: int, size: int, dim: int, capacity: int | None) -> Case:
    shape = (size, dim) if bank == "learnable" else (batch, size, dim)
    steps, topk = 6, 4

    def inputs() -> list[Tensor]:
        return [torch.randn(shape), torch.rand(batch, steps, topk)]

    def call(values: Tensor, weights: Tensor) -> Results:
        generator = torch.Generator().manual_seed(2)
        order = torch.rand(batch, size, generator=generator).argsort(1)[:, : steps * topk]
        indices = order.view(batch, steps, topk).to(values.device, torch.int32)
        counts = torch.arange(batch, dtype=torch.int32) % (steps + 1)
        wide = torch.promote_types(values.dtype, torch.float32)
        tape, offsets = ops.tape_gather(
            values, indices, weights.to(wide), counts, capacity=capacity
        )
        return (tape,), (offsets,)

    size_of = "exact" if capacity is None else f"capacity {capacity}"
    return Case("tape_gather", f"{bank} bank of {size} × {dim}, {size_of}", inputs, call)


def _attention_case(head_dim: int, input_lens: list[int], tape_lens: list[int]) -> Case:
    cu_inputs, cu_tapes = _layout(input_lens, tape_lens)
    rows = sum(input_lens) + sum(tape_lens) + 3

    def inputs() -> list[Tensor]:
        return list(torch.randn(rows, 3, 4, head_dim).unbind(1))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Results:
        return (ops.elastic_attention(q, k, v, cu_inputs, cu_tapes),), ()

    longest = max(a + b for a, b in zip(input_lens, tape_lens, strict=True))
    return Case("elastic_attention", f"heads of {head_dim}, up to {longest} rows", inputs, call)


def _ffn_case(
    dim: int, hidden: int, tape_hidden: int, rows: int, inputs: int, end: int, form: str
) -> Case:
    def make() -> list[Tensor]:
        return [
            torch.randn(rows, dim),
            *_parameters(dim, hidden, hidden),
            *(_parameters(dim, 2 * tape_hidden, tape_hidden) if tape_hidden else []),
        ]

    def call(x: Tensor, *parameters: Tensor) -> Results:
        counts = (inputs, end) if form == "int" else map(torch.tensor, (inputs, end))
        num_input_rows, num_rows = counts
        tape_ffn = FFN(*parameters[4:]) if tape_hidden else None
        return (
            ops.dual_ffn(x, num_input_rows, FFN(*parameters[:4]), tape_ffn, num_rows=num_rows),
        ), ()

    where = "host" if form == "int" else "device"
    return Case("dual_ffn", f"{dim} × {hidden} and {tape_hidden}, rows on the {where}", make, call)


def _parameters(dim: int, wide: int, hidden: int) -> list[Tensor]:
    return [
        torch.randn(wide, dim) * dim**-0.5,
        torch.randn(wide),
        torch.randn(dim, hidden) * hidden**-0.5,
        torch.randn(dim),
    ]


def _layout(input_lens: Sequence[int], tape_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    tapes = torch.tensor(tape_lens, dtype=torch.int32)
    return cumulative(torch.tensor(input_lens, dtype=torch.int32)), cumulative(
        tapes, start=sum(input_lens)
    )


# An example's bits, in company and alone


def _invariance(
    alone: Callable[[torch.dtype, int | None], list[Tensor]], backend: str, dtype: torch.dtype
) -> str | None:
    with use_backend(backend):
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
    out = ops.elastic_attention(q, k, v, *_layout(input_lens, tape_lens))[own]
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


def _model(backend: str) -> str | None:
    """The same logits and gradients as the padded, masked, eager model."""
    model = _vit()
    images = torch.randn(6, 3, 16, 16)
    with use_backend(backend):
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


def _graph(backend: str) -> str | None:
    """A step in capacity mode, captured once, replayed on other images."""
    model = _vit()
    images, others = torch.randn(2, 6, 3, 16, 16)
    static = images.clone()

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        logits = model(static, capacity=30).logits
        logits.square().sum().backward()
        return logits

    with use_backend(backend), contextlib.ExitStack() as stack:
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
