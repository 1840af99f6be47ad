"""Whole models, elastic and padded: adatape-kernels bench model --quick

A training step is forward, loss and every gradient; no optimiser. Images differ from run to run,
so that no result can be kept.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
    only_on_cuda,
)
from adatape_kernels.benchmarks.harness.suites import (
    PATTERNS,
    Positive,
    Selection,
    Size,
    Suite,
    Tape,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops.dense_vit import DenseViT
from adatape_kernels.benchmarks.ops.reading_peers import BANKS, BankKind, loop
from adatape_kernels.layers import TapeReader
from adatape_kernels.models import AdaTapeViT, adatape_vit
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes import measure

CLASSES, PIXELS = 1000, 224
GRADIENT_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.3}
"""All gradients together may differ by this part of their norm.

In a large batch some example's read turns on the last bits of two scores, in bfloat16 many do.
"""


class Variant(str):
    meaning = "Ti, S, B or L, a slash and a patch size"

    def __new__(cls, value: object) -> "Variant":
        text = super().__new__(cls, value)
        size, _, patch = text.partition("/")
        fits = patch.isdecimal() and int(patch) > 0 and PIXELS % int(patch) == 0
        if size not in ("Ti", "S", "B", "L") or not fits:
            raise ValueError(value)
        return text


class Reads(Tape):
    """Tape lengths as in Tape, or "tau" where the halting scores decide."""

    meaning = f"tau, {', '.join(PATTERNS)} or a number"

    def __new__(cls, value: object) -> "Reads":
        return str.__new__(cls, value) if value == "tau" else super().__new__(cls, value)  # type: ignore[return-value]


class ModelShape(NamedTuple):
    V: Variant = Variant("S/16")
    B: Size = Size(8)
    T: Size = Size(10)
    k: Size = Size(5)
    bank: BankKind = BankKind("input")
    M: Size = Size(10_000)
    """Only a learnable bank has so many tokens; an input-driven one has the image's."""
    tau: Positive = Positive(2)
    tape: Reads = Reads("tau")


class ModelInputs(NamedTuple):
    model: AdaTapeViT
    images: Tensor
    labels: Tensor
    training: bool
    tape_rows: int
    """The batch reads so many tape tokens."""


def check(shape: ModelShape) -> None:
    """Raise ValueError where the bank holds too few tokens."""
    patch = int(shape.V.partition("/")[2])
    tokens = shape.M if shape.bank == "learn" else (PIXELS // max(1, patch // 2)) ** 2
    needed = shape.k * (shape.T if shape.tape != "tau" else 1)
    if tokens < needed:
        raise ValueError(f"shape: expected a bank of at least {needed} tokens, got {tokens}")


def build(shape: ModelShape, dtype: torch.dtype, device_type: str) -> AdaTapeViT:
    imposed = shape.tape != "tau"
    model = adatape_vit(
        shape.V,
        num_classes=CLASSES,
        num_tape_tokens=shape.T,
        topk=shape.k,
        halt_threshold=float("inf") if imposed else float(shape.tau),
        bank=shape.bank,
        bank_size=shape.M,
    )
    nn.init.normal_(model.head.weight, std=model.config.dim**-0.5)
    if imposed:
        lens = torch.tensor(shape.tape.lens(shape.B, shape.T), device=device_type)
        for reader in model.encoder.readers.values():
            reader.normalised = functools.partial(_normalised, reader, lens)
    return model.to(device_type, dtype).eval()


def _normalised(
    reader: TapeReader, lens: Tensor, bank: Tensor | None, query: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise as the reader does, and let each example read so many entries as its tape takes."""
    values, query, _ = TapeReader.normalised(reader, bank, query)
    entries = torch.arange(values.shape[-2], device=lens.device)
    return values, query, entries >= reader.topk * lens.unsqueeze(1)


def inputs(model: AdaTapeViT, shape: ModelShape, training: bool) -> ModelInputs:
    like = model.head.weight
    images = torch.randn(shape.B, 3, PIXELS, PIXELS, device=like.device).to(like.dtype)
    labels = torch.randint(CLASSES, (shape.B,), device=like.device)
    with torch.no_grad():
        rows = int(model(images).tape_lens.sum())
    return ModelInputs(model, images, labels, training, rows)


def runner(
    given: ModelInputs, forward: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]
) -> Prepared:
    """Return a provider's forward or training step: logits, and all gradients as one vector."""
    parameters = list(given.model.parameters())

    def run() -> tuple[Tensor, ...]:
        if not given.training:
            with torch.no_grad():
                return (forward(given.images).logits,)
        out = forward(given.images)
        grads = torch.autograd.grad(loss(out, given.labels), parameters, allow_unused=True)
        return (out.logits, *(g for g in grads if g is not None))

    def results(found: Sequence[Tensor]) -> list[Tensor]:
        logits, *grads = found
        return [logits, torch.cat([g.flatten() for g in grads])] if grads else [logits]

    return Prepared(run, results)


def elastic(given: ModelInputs) -> Prepared:
    return runner(given, given.model, given.model.loss)


def flops(given: ModelInputs) -> int:
    if not given.training:
        return measure.flops(elastic(given).run)
    # The counter does not bear autograd.grad.
    counted = measure.flops(
        lambda: given.model.loss(given.model(given.images), given.labels).backward()
    )
    given.model.zero_grad()
    return counted


def with_capacity(compiled: bool) -> Callable[[ModelInputs], Prepared]:
    """Prepare a provider that is told the number of tape rows beforehand."""

    def prepare(given: ModelInputs) -> Prepared:
        model = (
            torch.compile(given.model, fullgraph=True, dynamic=False) if compiled else given.model
        )
        return runner(given, functools.partial(model, capacity=given.tape_rows), given.model.loss)

    return prepare


def padded(**options: Any) -> Callable[[ModelInputs], Prepared]:
    """Prepare the padded model, compiled with these options if there are any."""

    def prepare(given: ModelInputs) -> Prepared:
        other = given.model.padded()
        if given.images.dtype != torch.float32:
            other.select = _select_in_float32
        forward = torch.compile(other, **options) if options else other
        return runner(given, forward, given.model.loss)

    return prepare


def _select_in_float32(query: Tensor, keys: Tensor, **options: Any) -> TapeSelection:
    """Select in float32, since scores that are rounded to bfloat16 select other entries."""
    options = {k: v for k, v in options.items() if k not in ("average_query", "loss_type")}
    selection = loop(query, keys, **options)
    return selection._replace(weights=selection.weights.to(keys.dtype))


class DenseOutput(NamedTuple):
    logits: Tensor


def dense(reads: bool) -> Callable[[ModelInputs], Prepared]:
    def prepare(given: ModelInputs) -> Prepared:
        vit = DenseViT(given.model, round(given.tape_rows / max(1, len(given.images))), reads)

        def loss(out: DenseOutput, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(out.logits, labels)

        each = runner(given, lambda images: DenseOutput(vit(images)), loss)
        return each._replace(note="an anchor: not the same function, so not compared")

    return prepare


def reference(given: ModelInputs) -> list[Tensor]:
    """Return the results of the padded model in float32."""
    dtype = given.images.dtype
    exact = given._replace(images=given.images.float(), model=given.model.float())
    each = padded()(exact)
    found = list(each.results(each.run()))
    given.model.to(dtype)
    return found


def agree_on_most(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> str | None:
    """Compare the logits of all examples but a few as `agree` does, and gradients by their norm."""
    (logits, *grads), (exact_logits, *exact_grads) = found, expected
    errors = (logits.double() - exact_logits).abs().amax(1) / exact_logits.double().abs().max()
    few = tolerance < 0.01
    wrong = int((~(errors <= tolerance)).sum())
    if wrong > 1 + len(errors) // (50 if few else 4):
        return f"the logits of {wrong} of {len(errors)} examples are off, by {errors.max():.3g}"
    for grad, exact in zip(grads, exact_grads, strict=True):
        fault = _gradient_fault(grad.double(), exact.double(), few)
        if fault is not None:
            return fault
    return None


def _gradient_fault(grad: Tensor, exact: Tensor, few: bool) -> str | None:
    """Return None, or by how much the vector of all gradients differs from the reference's."""
    if grad.shape != exact.shape:
        return f"the gradients have the shape {tuple(grad.shape)}, not {tuple(exact.shape)}"
    off = (grad - exact).norm() / exact.norm()
    allowed = GRADIENT_TOLERANCE[torch.float32 if few else torch.bfloat16]
    return None if off <= allowed else f"the gradients are off by {off:.3g} of their norm"


MODEL_OPS = ("tape_select", "tape_gather", "elastic_attention_qkvpacked", "dual_ffn")
MODEL_BACKWARDS = ("tape_read_bwd", "elastic_attention_qkvpacked_bwd", "dual_ffn_bwd")
CAPACITY, COMPILED = f"{OURS}, capacity", f"{OURS}, compiled"
PEERS = (
    "padded",
    "padded, compiled",
    "padded, max-autotune",
    "dense ViT, same rows",
    "static ViT, mean length",
)


def case(shape: ModelShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    training = direction == "training step"
    torch.manual_seed(0)
    model = build(shape, dtype, device_type)
    given = inputs(model, shape, training)
    parameters = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    images = given.images.numel() * dtype.itemsize
    plain, compiled, tuned, oracle, static = PEERS
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(model, shape, training),
        reference=reference,
        providers=[
            Provider(OURS, elastic, ANY_BACKEND, graph=False),
            Provider(CAPACITY, with_capacity(compiled=False), ANY_BACKEND),
            Provider(COMPILED, with_capacity(compiled=True), ANY_BACKEND, compiled=True),
            Provider(plain, padded()),
            Provider(compiled, padded(dynamic=False), compiled=True),
            only_on_cuda(
                Provider(
                    tuned, padded(dynamic=False, mode="max-autotune-no-cudagraphs"), compiled=True
                ),
                device_type,
            ),
            Provider(oracle, dense(reads=False), checked=False),
            Provider(static, dense(reads=True), checked=False),
        ],
        flops=flops(given),
        # Images, parameters and the gradients of these pass through memory once at least.
        bytes=images + parameters * (2 if training else 1),
        agree=agree_on_most,
        peaks=training,
        measured_ops=[*MODEL_OPS, *(MODEL_BACKWARDS if training else ())],
        sets=1,
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 8
    default = [f"V=S/16 B={batch} T=10 k=5 tau=2"]
    deep = f"V=B/32 B={batch} T=64 k=2 tau=8 bank=learn"
    # In the first of these only the tape differs, in the others only the batch.
    scaling = [
        *(f"V=Ti/32 B={batch} T=128 k=2 bank=learn tape={t}" for t in (0, 16, 32, 64, 96, 128)),
        *(f"V=Ti/32 B={b} T=32 k=2 bank=learn tape=skewed" for b in _batches(device_type)),
    ]
    if device_type == "cuda":
        default += [f"V=B/16 B={batch} T=10 k=5 tau=2", deep]
    else:
        # Two processor cores compile 64 unrolled steps for many minutes.
        scaling.insert(0, deep)
    sweep = [
        f"V={size}/{patch} B={b} T={t} k=2 bank={bank} tape={tape}"
        for size, patch, t, tape, bank, b in itertools.product(
            ("Ti", "S", "B", "L"),
            (16, 32),
            (10, 32, 64, 128),
            PATTERNS,
            BANKS,
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )
        # Patches of 32 make an input-driven bank of 196.
        if bank == "learn" or patch == 16 or t < 98
    ]
    return Selection([scaling[2]], default, sweep, scaling)


def _batches(device_type: str) -> tuple[int, ...]:
    return (1, 4, 16, 64, 256, 512) if device_type == "cuda" else (1, 2, 4, 8, 16, 32)


SUITE = Suite(
    op="model",
    shape=ModelShape,
    directions=("forward", "training step"),
    providers=[OURS, CAPACITY, COMPILED, *PEERS],
    shapes=shapes,
    dtypes=for_products,
    case=case,
    check=check,
)
