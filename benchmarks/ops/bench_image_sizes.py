"""A model on images of many sizes, beside padding: adatape-kernels bench image_sizes --quick

An image has a class token and, in the proportions of photographs, as many patches as leave it
within its number of rows. A row's note says how many rows its provider computes in each layer
after the read.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
)
from adatape_kernels.benchmarks.harness.suites import (
    Positive,
    Selection,
    Size,
    Span,
    Suite,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops.bench_model import (
    CLASSES,
    MODEL_BACKWARDS,
    MODEL_OPS,
    PIXELS,
    Variant,
    agree_on_most,
    build,
    flops,
    runner,
)
from adatape_kernels.benchmarks.ops.bench_model import ModelShape as OneSize
from adatape_kernels.benchmarks.ops.reading_peers import BankKind
from adatape_kernels.models import AdaTapeOutput, AdaTapeViT

PROPORTIONS = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
"""Width over height."""
ALONE, PADDED = "ours, one image at a time", "padded to the largest"


class SizesShape(NamedTuple):
    V: Variant = Variant("S/16")
    B: Size = Size(16)
    N: Span = Span("50-257")
    T: Size = Size(10)
    k: Size = Size(5)
    bank: BankKind = BankKind("input")
    M: Size = Size(10_000)
    """Only a learnable bank has so many tokens; an input-driven one has each image's."""
    tau: Positive = Positive(2)


class SizesInputs(NamedTuple):
    """What `bench_model.runner` takes, with a list of images."""

    model: AdaTapeViT
    images: list[Tensor]
    labels: Tensor
    training: bool


def check(shape: SizesShape) -> None:
    """Raise ValueError where an image has no patch, or a shared bank too few tokens."""
    fewest, _ = shape.N.bounds
    if fewest < 2:
        raise ValueError(f"shape: expected N of at least 2, got {fewest}")
    if shape.bank == "learn" and shape.M < shape.k:
        raise ValueError(f"shape: expected a bank of at least {shape.k} tokens, got {shape.M}")


def grid(patches: int, proportion: float) -> tuple[int, int]:
    """Return rows and columns of at most so many patches in all."""
    rows = min(patches, max(1, round(math.sqrt(patches / proportion))))
    return rows, patches // rows


def inputs(model: AdaTapeViT, shape: SizesShape, training: bool) -> SizesInputs:
    like, patch = model.head.weight, model.config.patch_size
    images = []
    for i, rows in enumerate(shape.N.lens(shape.B)):
        height, width = grid(rows - 1, PROPORTIONS[i % len(PROPORTIONS)])
        image = torch.randn(3, height * patch, width * patch, device=like.device)
        images.append(image.to(like.dtype))
    labels = torch.randint(CLASSES, (shape.B,), device=like.device)
    return SizesInputs(model, images, labels, training)


def one_at_a_time(model: AdaTapeViT) -> Callable[[Sequence[Tensor]], AdaTapeOutput]:
    """Return a function that gives each image to the model by itself."""

    def forward(images: Sequence[Tensor]) -> AdaTapeOutput:
        each = [model([image]) for image in images]
        logits, tape_lens, ponder = (
            torch.cat([getattr(out, name) for out in each])
            for name in ("logits", "tape_lens", "ponder")
        )
        return AdaTapeOutput(logits, tape_lens, ponder, ())

    return forward


def rows_of(given: SizesInputs, padded: bool) -> int:
    """Return how many rows a layer after the read has."""
    model = given.model
    tokens = model.embed_elastic(given.images).tokens
    if padded:
        return tokens.batch * (tokens.max_inputs + model.config.num_tape_tokens)
    return tokens.num_input_rows + int(model(given.images).tape_lens.sum())


def provider(name: str, forward: Callable[[AdaTapeViT], Any], ours: bool) -> Provider:
    def prepare(given: SizesInputs) -> Prepared:
        with torch.no_grad():
            rows = rows_of(given, padded=not ours)
        each = runner(given, forward(given.model), given.model.loss)
        return each._replace(note=f"{rows} rows")

    return Provider(name, prepare, ANY_BACKEND if ours else None, graph=False)


def reference(given: SizesInputs) -> list[Tensor]:
    """Return the results of the padded model in float32."""
    dtype = given.images[0].dtype
    exact = given._replace(
        images=[image.float() for image in given.images], model=given.model.float()
    )
    each = runner(exact, exact.model.padded(), exact.model.loss)
    found = list(each.results(each.run()))
    given.model.to(dtype)
    return found


def case(shape: SizesShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    training = direction == "training step"
    torch.manual_seed(0)
    names = ("V", "B", "T", "k", "bank", "M", "tau")
    model = build(OneSize(**{name: getattr(shape, name) for name in names}), dtype, device_type)
    given = inputs(model, shape, training)
    parameters = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    images = sum(image.numel() for image in given.images) * dtype.itemsize
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(model, shape, training),
        reference=reference,
        providers=[
            provider(OURS, lambda model: model, ours=True),
            provider(ALONE, one_at_a_time, ours=True),
            provider(PADDED, lambda model: model.padded(), ours=False),
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
    batch = 256 if device_type == "cuda" else 16
    # The first has the model's own size in all images, where padding costs tape rows only.
    own = (PIXELS // 16) ** 2 + 1
    small = f"V=Ti/16 B=4 N=50-{own}"
    default = [f"V=S/16 B={batch} N={n}" for n in (f"{own}", f"50-{own}", f"50-{5 * own}")]
    return Selection([small], [small, *default], ())


SUITE = Suite(
    op="image_sizes",
    shape=SizesShape,
    directions=("forward", "training step"),
    providers=[OURS, ALONE, PADDED],
    shapes=shapes,
    dtypes=for_products,
    case=case,
    check=check,
)
