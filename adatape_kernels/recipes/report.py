"""The report of a trained model: accuracy, and its cost beside the padded model's."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from adatape_kernels.data.image_set import ImageSet, Normaliser, evenly_spaced, unit_range
from adatape_kernels.models import AdaTape, AdaTapeOutput, AdaTapeViT
from adatape_kernels.ops.op import current_backend, serving
from adatape_kernels.recipes import measure, pictures
from adatape_kernels.recipes.checkpoint import write_file
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.training import accuracy, predict

COMPARED_IMAGES = 360


@dataclass(frozen=True)
class Results:
    """What was measured; becomes report.json, a pair {elastic, padded} for each cost."""

    test_accuracy: float
    """Over the whole test set."""
    compared_images: int
    """Test images, one batch, over which the two models are compared."""
    max_abs_logit_difference: float
    images_that_read_differently: int
    forward_seconds: dict[str, measure.Timing]
    train_step_seconds: dict[str, measure.Timing]
    rows: dict[str, int]
    flops: dict[str, int]
    peak_bytes: dict[str, int]
    tape_lens: list[int]
    """How many images of the whole test set have each tape length, from 0 on."""

    def report(self) -> dict[str, Any]:
        """Return the report's entries: medians under the plain names, spreads beside them."""
        entries = asdict(self)
        for name in ("forward_seconds", "train_step_seconds"):
            timings = entries.pop(name)
            entries[name] = {kind: t["median"] for kind, t in timings.items()}
            entries[f"{name}_p20_p80"] = {k: [t["p20"], t["p80"]] for k, t in timings.items()}
        return entries


def write_report(
    out: Path,
    model: AdaTapeViT,
    data: ImageSet,
    normalise: Normaliser,
    entries: dict[str, Any],
    *,
    rounds: int,
) -> Results:
    """Compare, print a table, and write report.json, model.safetensors and pictures into `out`.

    Args:
        out: an existing folder.
        model: the trained model.
        data: its test half is used.
        normalise: what the model was trained with.
        entries: what else report.json should hold.
        rounds: repetitions of each timing.

    Raises:
        OSError: a file cannot be written.
    """
    results, output = compare(model, data, normalise, rounds)
    report = {**results.report(), **entries, **environment()}
    write_file(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_file(out / "model.safetensors", safetensors.torch.save(weights))
    pictures.draw_all(out, data, output, results, model.config.bank_patch_size)
    print(table(results))
    print(f"pictures, report and model: {out}{os.sep}")
    return results


def compare(
    model: AdaTape, data: ImageSet, normalise: Normaliser, rounds: int
) -> tuple[Results, AdaTapeOutput]:
    """Set the elastic model beside the padded one on the same weights.

    The costs are those of one batch of at most 360 test images, spread over the set.

    Returns what was measured, and the elastic model's output for every test image.
    """
    every = predict(model, data.test_images, normalise)
    sample = evenly_spaced(len(data.test_labels), COMPARED_IMAGES)
    images = normalise(unit_range(data.test_images[sample]))
    labels = data.test_labels[sample]
    padded = model.padded()
    models = {"elastic": model, "padded": padded}

    def forward(kind: str) -> AdaTapeOutput:
        with torch.no_grad():
            return models[kind](images)

    def step(kind: str) -> None:
        model.loss(models[kind](images), labels).backward()
        model.zero_grad()

    padded.eval()
    elastic, other = (forward(kind) for kind in models)
    same = torch.stack(
        [
            (a.indices == b.indices).flatten(1).all(1)
            for a, b in zip(elastic.reads, other.reads, strict=True)
        ]
    ).all(0)
    forwards = {kind: lambda kind=kind: forward(kind) for kind in models}
    forward_seconds = measure.seconds(forwards, rounds)
    flops = {kind: measure.flops(run) for kind, run in forwards.items()}
    padded.train()
    steps = {kind: lambda kind=kind: step(kind) for kind in models}
    train_step_seconds = measure.seconds(steps, rounds)
    peak_bytes = {kind: measure.peak_bytes(run) for kind, run in steps.items()}
    padded.eval()
    inputs = len(images) * model.embed(images[:1])[0].shape[1]
    possible = len(images) * model.config.num_tape_tokens * len(elastic.reads)
    results = Results(
        test_accuracy=accuracy(every, data.test_labels),
        compared_images=len(images),
        max_abs_logit_difference=(elastic.logits - other.logits).abs().max().item(),
        images_that_read_differently=int((~same).sum()),
        forward_seconds=forward_seconds,
        train_step_seconds=train_step_seconds,
        rows={"elastic": inputs + int(elastic.tape_lens.sum()), "padded": inputs + possible},
        flops=flops,
        peak_bytes=peak_bytes,
        tape_lens=every.tape_lens.bincount(minlength=model.config.num_tape_tokens + 1).tolist(),
    )
    return results, every


def table(results: Results) -> str:
    """Return the comparison as text."""
    batch = f"{results.compared_images} test images, one batch"
    lines = [
        "",
        f"test accuracy                  {results.test_accuracy:8.2%}",
        f"largest difference of logits   {results.max_abs_logit_difference:8.1e}"
        f"   ({results.images_that_read_differently} images read differently)",
        f"tape lengths                   {_describe(results.tape_lens)}",
        "",
        f"{batch:30} {'elastic':>10} {'padded':>10} {'padded/elastic':>15}",
    ]
    for label, pair, unit in cost_rows(results):
        ratio = pair["padded"] / pair["elastic"]
        shown = " ".join(f"{pair[kind] / unit:10,.1f}" for kind in ("elastic", "padded"))
        lines.append(f"{label:30} {shown} {ratio:14.2f}x")
    if (current_backend() or serving("elastic_attention", "cpu", torch.float32)) == "eager":
        lines += [
            "",
            "The ops ran on the eager reference, an exact loop over the examples: times show its",
            "overhead, rows and FLOPs the work that is saved.",
        ]
    return "\n".join(lines)


def cost_rows(results: Results) -> list[tuple[str, dict[str, float], float]]:
    """Return the label, the {elastic, padded} pair and the shown unit of each cost."""
    forward, step = (
        {kind: timing.median for kind, timing in timings.items()}
        for timings in (results.forward_seconds, results.train_step_seconds)
    )
    return [
        ("forward, ms", forward, 1e-3),
        ("training step, ms", step, 1e-3),
        ("rows computed", dict(results.rows), 1),
        ("forward, MFLOP", dict(results.flops), 1e6),
        ("training step, peak MB", dict(results.peak_bytes), 1e6),
    ]


def _describe(tape_lens: list[int]) -> str:
    return ", ".join(f"{count} x {length}" for length, count in enumerate(tape_lens) if count)
