"""Tells what the recipe `imagenet` costs on 8 GPUs, by arithmetic alone: no GPU has run it.

    python -m adatape_kernels.benchmarks.reports.imagenet_cost
    python -m adatape_kernels.benchmarks.reports.imagenet_cost --page docs/guides/imagenet.md

A forward pass is put together of the counted work in benchmarks/audit/roofline.csv and of
products, at an H100's rates (benchmarks/audit/cards.py). A training step is taken to be three of
them and what AdamW moves. What a recorded step took on an H200, over what is predicted for it so,
says by how much such a prediction may be too short.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adatape_kernels.benchmarks.audit.cards import CARDS, H200, MEMORY_SHARE, Card
from adatape_kernels.benchmarks.audit.work_counter import CountedWork
from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.imagenet_loading import RESULT
from adatape_kernels.benchmarks.reports.gpu_performance import (
    COUNTED,
    FORM_OF_RESULTS,
    MODELS,
    RESULTS,
    SIZE,
    CountedOp,
    Stage,
    counted_ops,
    plain,
    product,
)
from adatape_kernels.data.loading.guarded_workers import PREFETCH
from adatape_kernels.models import AdaTapeViTConfig
from adatape_kernels.recipes.training.train_config import TrainConfig

VARIANTS = ("S/16", "B/32")
GPUS = 8
TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000
COUNTED_IMAGES = 256
"""Number of images of a forward pass in roofline.csv and in the H200's rows."""
PASSES = 3
"""A training step is taken to be so many forward passes: its backward pass is two of them."""
ADAMW_BYTES = 28
"""AdamW reads a parameter, its gradient and two moments, and writes all but the gradient."""
STATE_BYTES = 16
"""What a GPU holds of a parameter in float32: itself, its gradient and two moments."""
_ATTENTION = {
    "S/16": ("B=256, 207 rows, 6 heads of 64", 207),
    "B/32": ("B=256, 57 rows, 12 heads of 64", 57),
}
"""Counted lines of attention, and their rows; both fill as many tiles as the recipe's rows."""
_NORMS = {384: ("52992 rows, D=384", 52992), 768: ("29184 rows, D=768", 29184)}
# What is gathered is the rows that are read, however many the bank has.
_GATHERS = {384: "M=784, D=384", 768: "M=196, D=768"}
_MEASURED_STEP, _MEASURED_STORE = "ours, capacity [graph]", "ours, capacity"
_OF_MEMORY = {
    "S/16": ("V=S/16 B=256 T=10 k=5 bank=input M=10000 tau=2 tape=tau", 207 * 384),
    "B/16": ("V=B/16 B=256 T=10 k=5 bank=input M=10000 tau=2 tape=tau", 207 * 768),
}
"""Rows of the H200 that hold a step's peak memory, and an image's features in a layer there."""
_MARKED = re.compile(r"(<!-- imagenet-cost -->\n).*?(<!-- /imagenet-cost -->)", re.DOTALL)


def recipe_config(variant: str) -> tuple[TrainConfig, AdaTapeViTConfig]:
    """Return the recipe with a variant, and the model that it makes."""
    options = {"data": "imagefolder", "recipe": "imagenet", "variant": variant}
    config = TrainConfig.of(options)
    model = config.vit_config(1000, 3)
    assert isinstance(model, AdaTapeViTConfig)
    return config, model


def stages(variant: str, ops: dict[tuple[str, str], CountedOp]) -> list[Stage]:
    """Return the stages of a forward pass of 256 images that all read to the end."""
    _, c = recipe_config(variant)
    batch, dim, depth = COUNTED_IMAGES, c.dim, c.depth
    tokens, entries = batch * c.num_patches, batch * c.bank_tokens
    tape = batch * c.num_tape_tokens
    rows, pixels = tokens + tape, c.in_channels * c.bank_patch_size**2
    lines = f"B={batch}, input-driven"
    steps = f"k={c.topk}, T={c.num_tape_tokens}"

    def counted(name: str, op: str, shape: str, times: int = 1, share: float = 1.0) -> Stage:
        line = ops[op, shape]
        works = [CountedWork().plus(work, share) for work in (line.needed, line.ours)]
        return Stage(name, times, *works)

    attention, counted_rows = _ATTENTION[variant]
    norm, norm_rows = _NORMS[dim]
    select = f"{lines}, M={c.bank_tokens}, K={dim // c.key_split}, {steps}"
    share = (rows / batch / counted_rows) ** 2
    return [
        Stage("patches", 1, *product(tokens, c.in_channels * c.patch_size**2, dim)),
        Stage("positions", 1, *plain(1, 2 * SIZE * tokens * dim)),
        Stage("bank's patches", 1, *product(entries, pixels, dim)),
        Stage("bank's positions and norm", 1, *plain(2, 4 * SIZE * entries * dim)),
        Stage("bank's product", 1, *product(entries, dim, dim)),
        counted("select", "tape_select", select),
        counted("gather", "tape_gather", f"{lines}, {_GATHERS[dim]}, {steps}"),
        Stage("tape's product", 1, *product(tape, dim, 2 * c.tape_mlp_dim)),
        Stage("tape's second product", 1, *product(tape, c.tape_mlp_dim, dim)),
        Stage("appending the tape", 1, *plain(1, 2 * SIZE * rows * dim)),
        Stage("queries, keys, values", depth, *product(rows, dim, 3 * dim)),
        counted("attention", "elastic_attention", attention, depth, share),
        Stage("attention's product", depth, *product(rows, dim, dim)),
        counted("sum and norm", "add_layer_norm", norm, 2 * depth, rows / norm_rows),
        Stage("feed-forward", depth, *product(rows, dim, c.ffn_dim)),
        Stage("activation", depth, *plain(1, 2 * SIZE * rows * c.ffn_dim)),
        Stage("feed-forward's second", depth, *product(rows, c.ffn_dim, dim)),
        Stage("head", 1, *product(batch, dim, c.num_classes)),
    ]


def parameters(variant: str) -> int:
    """Return the number of parameters of a variant's model."""
    import torch

    with torch.device("meta"):
        model = recipe_config(variant)[0].model(1000, 3)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Recorded:
    """What an H200 took beside what was predicted for it, and what a step held."""

    shortfall: float
    """A recorded training step of S/16, over three times the predicted forward pass."""
    bytes_by_feature: float
    """Bytes that a step holds, by image, row, feature and layer: the most of two models."""


def recorded(results: Path, ops: dict[tuple[str, str], CountedOp]) -> Recorded:
    """Return what the rows of the H200 say."""
    rows = {
        (row.shape, row.provider): row
        for row in records.read(results / "nvidia-h200.csv")
        if (row.op, row.direction, row.dtype) == ("model", "training step", "bfloat16")
    }
    model = MODELS[0]
    predicted = sum(
        stage.times * H200.predicted(stage.ours) for stage in model.stages(ops, FORM_OF_RESULTS)
    )
    taken = rows[model.measured, _MEASURED_STEP].median_s
    held = []
    for variant, (shape, features) in _OF_MEMORY.items():
        most = rows[shape, _MEASURED_STORE].peak_bytes
        depth = recipe_config(variant)[1].depth
        held.append((most or 0) / (COUNTED_IMAGES * features * depth))
    return Recorded((taken or 0) / (PASSES * predicted), max(held))


@dataclass(frozen=True)
class ImageNetCost:
    """What a variant's run costs."""

    variant: str
    parameters: int
    steps: int
    """Of all epochs."""
    batch: int
    """Number of images in a step, of all GPUs."""
    step: float
    """Predicted seconds of a step, in which every GPU computes its share of the batch."""
    slower: float
    """The same, as much longer as the H200's recorded step was than what is predicted for it."""
    activations: float
    """Bytes that a GPU holds for the backward pass."""

    @property
    def state(self) -> int:
        """Bytes of parameters, gradients and moments on each GPU."""
        return STATE_BYTES * self.parameters


def cost(
    variant: str, card: Card, ops: dict[tuple[str, str], CountedOp], past: Recorded
) -> ImageNetCost:
    """Return what a variant's run costs on 8 GPUs."""
    config, model = recipe_config(variant)
    assert config.batch is not None
    share = config.batch / GPUS
    forward = sum(stage.times * card.predicted(stage.ours) for stage in stages(variant, ops))
    computing = PASSES * forward * share / COUNTED_IMAGES
    count = parameters(variant)
    updating = ADAMW_BYTES * count / (MEMORY_SHARE * card.memory)
    features = (model.num_patches + model.num_tape_tokens) * model.dim * model.depth
    return ImageNetCost(
        variant,
        count,
        config.epochs * -(-TRAIN_IMAGES // config.batch),
        config.batch,
        computing + updating,
        past.shortfall * computing + updating,
        past.bytes_by_feature * share * features,
    )


def tables(loading: dict[str, float], counted: Path = COUNTED, results: Path = RESULTS) -> str:
    """Return the tables of the page.

    Args:
        loading: what benchmarks/imagenet_loading.py has measured.
        counted: the counted work of all ops.
        results: the folder of recorded rows.
    """
    ops = counted_ops(counted)
    past = recorded(results, ops)
    card = next(each for each in CARDS if each.name == "H100")
    found = [cost(variant, card, ops, past) for variant in VARIANTS]
    core, size = loading["prepared_per_core_second"], loading["file_bytes"]

    def line(name: str, *cells: str) -> str:
        return f"| {' | '.join((name, *cells))} |"

    def needed(name: str, rate: float, seconds: float) -> list[str]:
        return [
            f"{rate:,.0f}",
            f"{rate * size / 1e9:,.1f} GB/s",
            f"{rate / core:,.0f}",
            f"{seconds / 3600:,.1f} h",
        ]

    lines = [line("on 8 H100", *VARIANTS), line("---", *["---"] * len(found))]
    for name, cell in (
        ("parameters", lambda c: f"{c.parameters / 1e6:.1f} M"),
        ("steps of 4,096 images, 300 epochs", lambda c: f"{c.steps:,}"),
        ("a step, predicted", lambda c: f"{1e3 * c.step:,.0f} ms"),
        (
            f"a step that is {past.shortfall:.1f} times as long, as the recorded one of an H200",
            lambda c: f"{1e3 * c.slower:,.0f} ms",
        ),
        ("all steps, predicted", lambda c: f"{c.steps * c.step / 3600:.1f} h"),
        ("all of the longer steps", lambda c: f"{c.steps * c.slower / 3600:.1f} h"),
        ("memory: parameters, gradients, moments", lambda c: f"{c.state / 1e9:.2f} GB"),
        ("memory: kept for the backward pass", lambda c: f"{c.activations / 1e9:.1f} GB"),
        (
            "host memory: batches that wait, for each worker of a GPU",
            lambda c: f"{PREFETCH * c.batch / GPUS * 3 * 224**2 * 4 / 1e9:.2f} GB",
        ),
    ):
        lines.append(line(name, *(cell(each) for each in found)))
    lines += ["", line("so that GPUs never wait", "images/s", "from disk", "cores", "all steps")]
    lines.append(line(*["---"] * 5))
    for each in found:
        for name, step in (("predicted", each.step), ("longer", each.slower)):
            cells = needed(name, each.batch / step, each.steps * step)
            lines.append(line(f"{each.variant}, {name} steps", *cells))
    lines += ["", line("so many cores", "images/s", "from disk", "all images of 300 epochs")]
    lines.append(line(*["---"] * 4))
    for cores in (32, 96, 192):
        rate = cores * core
        hours = 300 * TRAIN_IMAGES / rate / 3600
        disk = f"{rate * size / 1e9:,.2f} GB/s"
        lines.append(line(f"{cores}", f"{rate:,.0f}", disk, f"{hours:,.1f} h"))
    return "\n".join(lines)


def fill(text: str, made: str) -> str:
    """Return the page with its tables made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}{made}\n{match[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or fill the page; return 2 if a file cannot be read or written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--page", type=Path, help="fill the tables of this page")
    page = parser.parse_args(argv).page
    try:
        made = tables(json.loads(RESULT.read_text(encoding="utf-8")))
        if page is None:
            print(made)
        else:
            page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    except (ValueError, KeyError, OSError) as error:
        print(f"imagenet_cost: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
