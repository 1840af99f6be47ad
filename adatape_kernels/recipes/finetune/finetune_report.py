"""What a ViT that was fine-tuned without and with tapes reaches, and what each kind of it costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from adatape_kernels.data.image_set import ImageSet, Normaliser, evenly_spaced, unit_range
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig
from adatape_kernels.recipes import measure
from adatape_kernels.recipes.devices import CPU, device_name, moved
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_comparison import COMPARED_IMAGES
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.training.execution import computing_in, in_float32
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_loop import accuracy, predict

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"num_tape_tokens": 0},
    "input": {"bank": "input"},
    "learn": {"bank": "learn"},
}
"""The options by which the fine-tuned models differ, by the kind's name."""
CONTROL = "plain"
"""The kind that has no tape, which the others are compared with."""
ROUNDS = 15
"""Number of times that each timing is repeated."""

_TITLES = {"plain": "no tape", "input": "tape of image patches", "learn": "tape of learned tokens"}


@dataclass(frozen=True)
class Conversion:
    """The source beside the model that is made of it, while that reads nothing."""

    max_abs_logit_difference: float
    """Largest difference between the logits, over all test images."""
    test_accuracy: float


@dataclass(frozen=True)
class KindResult:
    """What one kind reached with each seed, and what it costs."""

    test_accuracy: tuple[float, ...]
    """Share of the test images that are classified right, for each seed."""
    unread_test_accuracy: tuple[float, ...]
    """The same while the model reads nothing, though it was trained to read."""
    mean_tape_length: tuple[float, ...]
    """Mean number of tape tokens of a test image, for each seed."""
    parameters: int
    rows: float
    """Number of rows of an image that a layer behind every read computes, over the images that are
    timed."""
    flops: float
    """Floating-point operations of the products of a forward pass, for each image."""
    forward_seconds: measure.Timing
    """Time of a forward pass over the timed images, of the first seed's model."""
    train_step_seconds: measure.Timing
    """Time of a forward and backward pass over them."""


@dataclass(frozen=True)
class FinetuneReport:
    """A ViT as it came, and fine-tuned in several kinds."""

    source_test_accuracy: float
    timed_images: int
    """Number of test images, in one batch, by which costs are measured."""
    conversion: dict[str, Conversion]
    """By the kinds that read."""
    kinds: dict[str, KindResult]
    dtype: str = "float32"
    """What the runs were computed in, and what is timed."""
    device: str = "cpu"
    """Where all of it was computed."""

    def added(self, kind: str) -> tuple[float, ...]:
        """Return what a kind's accuracy is above that of the control, for each seed."""
        pairs = zip(self.kinds[kind].test_accuracy, self.kinds[CONTROL].test_accuracy, strict=True)
        return tuple(ours - theirs for ours, theirs in pairs)

    def entries(self) -> dict[str, Any]:
        """Return the entries of report.json."""
        added = {kind: {"added_test_accuracy": self.added(kind)} for kind in self.kinds}
        found = asdict(self)
        found["kinds"] = {
            kind: {**found["kinds"][kind], **added[kind]} if kind != CONTROL else entries
            for kind, entries in found["kinds"].items()
        }
        return {**environment(), **found}

    def table(self) -> str:
        """Return the report as text."""
        count = len(self.kinds[CONTROL].test_accuracy)
        seeds = f"fine-tuned, {count} {'seed' if count == 1 else 'seeds'}"
        lines = [
            "",
            f"the source's test accuracy: {self.source_test_accuracy:.2%}",
            *(
                f"converted ({_TITLES[kind]}), nothing read: {found.test_accuracy:.2%}, largest "
                f"difference of logits {found.max_abs_logit_difference:.1e}"
                for kind, found in self.conversion.items()
            ),
            "",
            f"{seeds:24}{'test accuracy':>25}{'tape adds':>11}"
            f"{'unread':>9}{'tokens':>8}{'rows':>7}{'MFLOP':>8}{'forward':>10}{'step':>10}",
        ]
        for kind, found in self.kinds.items():
            reached = found.test_accuracy
            spread = f"{mean(reached):.2%} ({min(reached):.2%} to {max(reached):.2%})"
            adds, unread = "", ""
            if kind != CONTROL:
                adds = f"{100 * mean(self.added(kind)):+.2f} pp"
                unread = f"{mean(found.unread_test_accuracy):.2%}"
            lines.append(
                f"{_TITLES[kind]:24}{spread:>25}{adds:>11}{unread:>9}"
                f"{mean(found.mean_tape_length):8.2f}{found.rows:7.1f}{found.flops / 1e6:8.2f}"
                f"{1e3 * found.forward_seconds.median:7.1f} ms"
                f"{1e3 * found.train_step_seconds.median:7.1f} ms"
            )
        lines += [
            "",
            "tape adds: to the accuracy of the same seed without a tape, on average; unread: the",
            "accuracy of the same model while it reads nothing; tokens, rows, MFLOP: of an image;",
            f"forward and training step: of {self.timed_images} images",
        ]
        return "\n".join(lines)


def report(
    source: SourceFile,
    data: ImageSet,
    configs: Mapping[str, AdaTapeViTConfig],
    runs: Mapping[str, Sequence[Path]],
    device: torch.device = CPU,
    dtype: str = "float32",
) -> FinetuneReport:
    """Measure a source and the finished runs that began with it.

    Args:
        source: the ViT.
        data: its test half is used.
        configs: the configuration that each kind began with.
        runs: by kind, the folders of its runs, a seed after the other.
        device: where to compute.
        dtype: what the runs were computed in, and what is timed; the source and what is made of it
            are compared in float32.

    Raises:
        ValueError: a run's model or report cannot be read.
    """
    first = {kind: _loaded(folders[0], device) for kind, folders in runs.items()}
    preprocessing = first[CONTROL].preprocessing
    assert preprocessing is not None  # a run saves it with its model
    normalise = Normaliser(preprocessing.mean, preprocessing.std)
    plain = source.model(configs[CONTROL]).to(device)
    # The padded model on the same parameters is what everybody's ViT is: plain torch.
    padded: Any = plain.padded()
    expected = predict(padded, data.test_images, normalise)
    conversion = {}
    for kind, config in configs.items():
        if kind != CONTROL:
            model = source.model(replace(config, halt_threshold=0.0)).to(device)
            came = predict(model, data.test_images, normalise)
            difference = (came.logits - expected.logits).abs().max().item()
            conversion[kind] = Conversion(difference, accuracy(came, data.test_labels))
    sample = evenly_spaced(len(data.test_labels), COMPARED_IMAGES)
    images = moved(normalise(unit_range(data.test_images[sample])), device)
    labels = moved(data.test_labels[sample], device)

    def forward(kind: str) -> Any:
        with torch.no_grad(), computing_in(dtype, device):
            return first[kind](images)

    def step(kind: str) -> None:
        model = first[kind]
        with computing_in(dtype, device):
            output = model(images)
        model.loss(in_float32(output), labels).backward()
        model.zero_grad()

    forwards = {kind: lambda kind=kind: forward(kind) for kind in first}
    forward_seconds = measure.seconds(forwards, ROUNDS, device=device)
    steps = {kind: lambda kind=kind: step(kind) for kind in first}
    step_seconds = measure.seconds(steps, ROUNDS, device=device)
    kinds = {}
    for kind, folders in runs.items():
        reports = [json.loads((folder / REPORT).read_bytes()) for folder in folders]
        reached = tuple(float(entries["test_accuracy"]) for entries in reports)
        without_reading = tuple(
            accuracy(predict(unread, data.test_images, normalise, dtype=dtype), data.test_labels)
            for unread in (_loaded(folder, device, halt_threshold=0.0) for folder in folders)
        )
        inputs = first[kind].embed(images[:1])[0].shape[1]
        kinds[kind] = KindResult(
            test_accuracy=reached,
            unread_test_accuracy=without_reading,
            mean_tape_length=tuple(e["metrics"][-1]["mean_tape_length"] for e in reports),
            parameters=sum(parameter.numel() for parameter in first[kind].parameters()),
            rows=inputs + forward(kind).tape_lens.double().mean().item(),
            flops=measure.flops(forwards[kind]) / len(images),
            forward_seconds=forward_seconds[kind],
            train_step_seconds=step_seconds[kind],
        )
    return FinetuneReport(
        accuracy(expected, data.test_labels),
        len(images),
        conversion,
        kinds,
        dtype,
        device_name(device),
    )


def _loaded(folder: Path, device: torch.device, halt_threshold: float | None = None) -> AdaTapeViT:
    model = load(folder, device=device, halt_threshold=halt_threshold)
    assert isinstance(model, AdaTapeViT)  # `train` makes no other
    return model
