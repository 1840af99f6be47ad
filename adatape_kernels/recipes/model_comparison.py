"""A trained model beside its padded counterpart: do they agree, and what does each cost?"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.image_set import ImageSet, Normaliser, evenly_spaced, unit_range
from adatape_kernels.models import AdaTape, AdaTapeOutput, ImageClassifier
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes import measure
from adatape_kernels.recipes.devices import device_of, moved
from adatape_kernels.recipes.machine import attention_backend
from adatape_kernels.recipes.training.execution import computing_in, in_float32
from adatape_kernels.recipes.training.train_loop import accuracy, predict

COMPARED_IMAGES = 360


class Cost(NamedTuple):
    """What both models spend on the same images, and how to show it."""

    label: str
    """Name of the cost and of the unit that it is shown in."""
    elastic: float
    padded: float
    unit: float
    """Size of one shown unit: 1e-3 shows seconds as milliseconds."""


@dataclass(frozen=True)
class ModelComparison:
    """What was measured; a cost is a dictionary with the keys "elastic" and "padded"."""

    test_accuracy: float
    """Share of the whole test set that is classified right, 0 to 1."""
    compared_images: int
    """Number of test images, in one batch, over which the two models are compared."""
    max_abs_logit_difference: float
    """Largest difference between the two models' logits, over the compared images."""
    images_that_read_differently: int
    """Number of compared images for which the two models read different bank tokens, or halt after
    different layers."""
    forward_seconds: dict[str, measure.Timing]
    """Time of a forward pass over the compared images."""
    train_step_seconds: dict[str, measure.Timing]
    """Time of a forward and backward pass over the compared images."""
    rows: dict[str, int]
    """Number of rows over the compared images: of an AdaTape those that a layer behind every read
    computes, of another model those of all layers together."""
    flops: dict[str, int]
    """Floating-point operations of the products of a forward pass."""
    peak_bytes: dict[str, int]
    """Most memory that a training step holds at a time."""
    attention_backend: str
    """Name of the backend that served the elastic model's attention."""
    images_by_tape_length: list[int]
    """Entry n is the number of images of the whole test set that read n tape tokens."""
    rows_by_layer: list[int] | None = None
    """Number of rows that each layer computes over the whole test set; None of an AdaTape."""
    dtype: str = "float32"
    """What the products of everything here but `errors` were computed in."""
    errors: dict[str, float] | None = None
    """Of a model in bf16, the largest distance of each model's logits from those of the padded one
    in float32, over the compared images that all three read alike; None of float32, or where there
    is no such image. By the rule for all ops the elastic one is to be at most twice the padded."""

    def report(self) -> dict[str, Any]:
        """Return the entries of report.json.

        A timing becomes its median under the plain name, and the 20th and 80th percentile under
        the name with the suffix _p20_p80.
        """
        entries = asdict(self)
        for name in ("rows_by_layer", "errors"):
            if entries[name] is None:
                del entries[name]
        for name in ("forward_seconds", "train_step_seconds"):
            timings = entries.pop(name)
            entries[name] = {kind: t["median"] for kind, t in timings.items()}
            entries[f"{name}_p20_p80"] = {k: [t["p20"], t["p80"]] for k, t in timings.items()}
        return entries

    def costs(self) -> list[Cost]:
        """Return each cost as tables and pictures show it."""
        forward, step = (
            {kind: timing.median for kind, timing in timings.items()}
            for timings in (self.forward_seconds, self.train_step_seconds)
        )
        return [
            Cost("forward, ms", **forward, unit=1e-3),
            Cost("training step, ms", **step, unit=1e-3),
            Cost("rows computed", **self.rows, unit=1),
            Cost("forward, MFLOP", **self.flops, unit=1e6),
            Cost("training step, peak MB", **self.peak_bytes, unit=1e6),
        ]


def compare(
    model: AdaTape | ImageClassifier,
    data: ImageSet,
    normalise: Normaliser,
    rounds: int,
    dtype: str = "float32",
) -> tuple[ModelComparison, AdaTapeOutput]:
    """Set an elastic model beside the padded one on the same weights.

    The costs are those of one batch of at most 360 test images, spread over the set.

    Args:
        model: the elastic model, on the device that is to compute.
        data: its test half is used.
        normalise: what the model was trained with.
        rounds: number of times that each timing is repeated.
        dtype: what products are computed in, one of `execution.DTYPES`.

    Returns:
        What was measured, and the elastic model's output for every test image, on the CPU.

    Raises:
        ValueError: rounds is no positive integer.
        TypeError: the model is neither an AdaTape nor one of images, or data is no ImageSet.
    """
    as_integer("rounds", rounds, 1)
    if not isinstance(model, AdaTape):
        check_kind("model", model, ImageClassifier)
    check_kind("data", data, ImageSet)
    device = device_of(model)
    every = predict(model, data.test_images, normalise, dtype=dtype)
    sample = evenly_spaced(len(data.test_labels), COMPARED_IMAGES)
    images = moved(normalise(unit_range(data.test_images[sample])), device)
    labels = moved(data.test_labels[sample], device)
    models: dict[str, Any] = {"elastic": model}
    padded = models["padded"] = models["elastic"].padded()

    def forward(kind: str, dtype: str = dtype) -> AdaTapeOutput:
        with torch.no_grad(), computing_in(dtype, device):
            return in_float32(models[kind](images))

    def step(kind: str) -> None:
        with computing_in(dtype, device):
            output = models[kind](images)
        model.loss(in_float32(output), labels).backward()
        model.zero_grad()

    padded.eval()
    elastic, other = (forward(kind) for kind in models)
    backend = attention_backend(lambda: forward("elastic"))
    same, errors = _alike(elastic, other), None
    if dtype != "float32":
        exact = forward("padded", "float32")
        alike = same & _alike(other, exact)
        if alike.any():
            errors = {
                kind: (output.logits - exact.logits)[alike].abs().max().item()
                for kind, output in (("elastic", elastic), ("padded", other))
            }
    forwards = {kind: lambda kind=kind: forward(kind) for kind in models}
    forward_seconds = measure.seconds(forwards, rounds, device=device)
    flops = {kind: measure.flops(run) for kind, run in forwards.items()}
    padded.train()
    steps = {kind: lambda kind=kind: step(kind) for kind in models}
    train_step_seconds = measure.seconds(steps, rounds, device=device)
    peak_bytes = {kind: measure.peak_bytes(run, device) for kind, run in steps.items()}
    padded.eval()
    if isinstance(model, AdaTape):
        inputs = len(images) * model.embed(images[:1])[0].shape[1]
        tape_tokens = model.config.num_tape_tokens
        possible = len(images) * tape_tokens * len(elastic.reads)
        rows = {"elastic": inputs + int(elastic.tape_lens.sum()), "padded": inputs + possible}
        by_layer = None
    else:
        tape_tokens = 0
        rows = {"elastic": sum(rows_by_layer(model, elastic))}
        rows["padded"] = len(images) * rows_of_image(model) * model.config.depth
        by_layer = rows_by_layer(model, every)
    lengths = every.tape_lens.bincount(minlength=tape_tokens + 1)
    comparison = ModelComparison(
        test_accuracy=accuracy(every, data.test_labels),
        compared_images=len(images),
        max_abs_logit_difference=(elastic.logits - other.logits).abs().max().item(),
        images_that_read_differently=int((~same).sum()),
        forward_seconds=forward_seconds,
        train_step_seconds=train_step_seconds,
        rows=rows,
        flops=flops,
        peak_bytes=peak_bytes,
        attention_backend=backend,
        images_by_tape_length=lengths.tolist(),
        rows_by_layer=by_layer,
        dtype=dtype,
        errors=errors,
    )
    return comparison, every


def _alike(a: AdaTapeOutput, b: AdaTapeOutput) -> Tensor:
    """Return (batch,) bool, the examples that two models read or halt alike."""
    same = torch.ones(len(a), dtype=torch.bool, device=a.device)
    for ours, theirs in zip(a.reads, b.reads, strict=True):
        same &= (ours.indices == theirs.indices).flatten(1).all(1)
    if a.halted is not None and b.halted is not None:
        same &= (a.halted.steps == b.halted.steps).reshape(len(a), -1).all(1)
    return same


def rows_by_layer(model: ImageClassifier, output: AdaTapeOutput) -> list[int]:
    """Return how many rows each layer computed, of a model that reads no tape.

    Args:
        model: the model.
        output: what it returned for images of its own size.
    """
    depth = model.config.depth
    if output.halted is None:
        return depth * [len(output) * rows_of_image(model)]
    rows = output.halted.rows_per_step
    return [*rows, *(depth - len(rows)) * [0]]


def rows_of_image(model: ImageClassifier) -> int:
    """Return how many rows an image of the model's own size has before any layer."""
    return model.config.num_patches + model.num_prefix_tokens
