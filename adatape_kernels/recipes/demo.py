"""The demo: train a small AdaTape ViT on real digits, then set it beside its padded counterpart."""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor

from adatape_kernels.backend import serving
from adatape_kernels.data import ImageSet, digits
from adatape_kernels.models import AdaTape, AdaTapeOutput, AdaTapeViT, AdaTapeViTConfig
from adatape_kernels.recipes import measure, pictures

EPOCHS = 50
BATCH = 48
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
WARMUP_STEPS = 30
ROUNDS = 15

# Four patches of 4 x 4 pixels go in; the 64 single pixels are the bank that a tape is read from.
CONFIG = AdaTapeViTConfig(
    num_classes=10,
    dim=64,
    depth=2,
    num_heads=4,
    ffn_dim=128,
    tape_ffn_dim=64,
    key_split=2,
    image_size=8,
    in_channels=1,
    patch_size=4,
    bank_patch_size=1,
)


@dataclass(frozen=True)
class Results:
    """What the demo measured; becomes report.json, a pair {elastic, padded} for each cost."""

    test_accuracy: float
    max_abs_logit_difference: float
    images_that_read_differently: int
    forward_seconds: dict[str, measure.Timing]
    train_step_seconds: dict[str, measure.Timing]
    rows: dict[str, int]
    flops: dict[str, int]
    peak_bytes: dict[str, int]
    tape_lens: list[int]
    """How many test images have each tape length, from 0 on."""

    def report(self) -> dict[str, Any]:
        """Return the report's entries: medians under the plain names, spreads beside them."""
        entries = asdict(self)
        for name in ("forward_seconds", "train_step_seconds"):
            timings = entries.pop(name)
            entries[name] = {kind: t["median"] for kind, t in timings.items()}
            entries[f"{name}_p20_p80"] = {k: [t["p20"], t["p80"]] for k, t in timings.items()}
        return entries


def run(out: str | Path = "adatape-demo", *, epochs: int = EPOCHS, seed: int = 0) -> Results:
    """Train, compare, print a table, and write report.json, the model and pictures into `out`.

    Args:
        out: a folder, made if it is missing.
        epochs: passes over the 1,437 training images.
        seed: of the split, the parameters and the batches.

    Raises:
        ValueError: epochs is not positive, or `out` is a file.
        OSError: the folder cannot be made or written.
        RuntimeError: a package of the extra `demo` is missing, or the loss is not finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected 1 or more, got {epochs}")
    pictures.require()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # better now than after a minute of training
        pass
    data = normalise(digits(seed))
    torch.manual_seed(seed)
    model = AdaTapeViT(CONFIG)
    train(model, data, epochs)
    results, output = compare(model, data)
    report = {**results.report(), "epochs": epochs, "seed": seed, **environment()}
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    save_model(model, str(out / "model.safetensors"))
    pictures.draw_all(out, data, output, results)
    print(table(results))
    print(f"pictures, report and model: {out}{os.sep}")
    return results


def normalise(data: ImageSet) -> ImageSet:
    """Shift and scale the images to the training set's mean 0 and standard deviation 1."""
    mean, std = data.train_images.mean(), data.train_images.std()
    return ImageSet(
        (data.train_images - mean) / std,
        data.train_labels,
        (data.test_images - mean) / std,
        data.test_labels,
        data.num_classes,
    )


def train(model: AdaTape, data: ImageSet, epochs: int) -> None:
    """Train with AdamW, warm-up and cosine decay on slightly turned and moved images.

    Raises:
        RuntimeError: the loss is not finite; names the step.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = max(1, len(data.train_labels) // BATCH)
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    model.train()
    # A log file gets a line every few seconds instead of a moving bar.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=steps, desc="training on digits", unit="step", mininterval=interval) as bar:
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(data.train_labels))
            batch = order[step % per_epoch * BATCH :][:BATCH]
            output = model(augment(data.train_images[batch]))
            labels = data.train_labels[batch]
            loss = model.loss(output, labels, label_smoothing=LABEL_SMOOTHING)
            if not loss.isfinite():
                raise RuntimeError(f"loss: expected a finite value at step {step}, got {loss}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right = (output.logits.argmax(1) == labels).float().mean()
            bar.set_postfix(
                loss=f"{loss.item():.2f}",
                accuracy=f"{right.item():.0%}",
                tape=f"{output.tape_lens.float().mean().item():.1f}",
                refresh=False,
            )
            bar.update()


def augment(images: Tensor) -> Tensor:
    """Turn images (batch, c, h, w) by up to 11 degrees, scale by 15 %, move by 10 % of a side."""
    batch = len(images)
    angle, scale = 0.2 * _symmetric(batch), 1 + 0.15 * _symmetric(batch)
    dx, dy = 0.2 * _symmetric(2, batch)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, -sine, dx], 1), torch.stack([sine, cosine, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _symmetric(*shape: int) -> Tensor:
    return 2 * torch.rand(shape) - 1


def compare(model: AdaTape, data: ImageSet) -> tuple[Results, AdaTapeOutput]:
    """Set the elastic model beside the padded one on the same weights and the whole test set.

    Returns what was measured, and the elastic model's output for the test images.
    """
    images, labels = data.test_images, data.test_labels
    padded = model.padded()
    models = {"elastic": model, "padded": padded}

    def forward(kind: str) -> AdaTapeOutput:
        with torch.no_grad():
            return models[kind](images)

    def step(kind: str) -> None:
        model.loss(models[kind](images), labels).backward()
        model.zero_grad()

    padded.eval()
    outputs = {kind: forward(kind) for kind in models}
    elastic, other = outputs["elastic"], outputs["padded"]
    same = torch.stack(
        [
            (a.indices == b.indices).flatten(1).all(1)
            for a, b in zip(elastic.reads, other.reads, strict=True)
        ]
    ).all(0)
    forwards = {kind: lambda kind=kind: forward(kind) for kind in models}
    forward_seconds = measure.seconds(forwards, ROUNDS)
    flops = {kind: measure.flops(run) for kind, run in forwards.items()}
    padded.train()
    steps = {kind: lambda kind=kind: step(kind) for kind in models}
    train_step_seconds = measure.seconds(steps, ROUNDS)
    peak_bytes = {kind: measure.peak_bytes(run) for kind, run in steps.items()}
    padded.eval()
    inputs = len(images) * model.embed(images[:1])[0].shape[1]
    possible = len(images) * model.config.num_tape_tokens * len(elastic.reads)
    results = Results(
        test_accuracy=(elastic.logits.argmax(1) == labels).float().mean().item(),
        max_abs_logit_difference=(elastic.logits - other.logits).abs().max().item(),
        images_that_read_differently=int((~same).sum()),
        forward_seconds=forward_seconds,
        train_step_seconds=train_step_seconds,
        rows={"elastic": inputs + int(elastic.tape_lens.sum()), "padded": inputs + possible},
        flops=flops,
        peak_bytes=peak_bytes,
        tape_lens=elastic.tape_lens.bincount(minlength=model.config.num_tape_tokens + 1).tolist(),
    )
    return results, elastic


def table(results: Results) -> str:
    """Return the comparison as text."""
    lines = [
        "",
        f"test accuracy                  {results.test_accuracy:8.2%}",
        f"largest difference of logits   {results.max_abs_logit_difference:8.1e}"
        f"   ({results.images_that_read_differently} images read differently)",
        f"tape lengths                   {_describe(results.tape_lens)}",
        "",
        f"{'360 test images, one batch':30} {'elastic':>10} {'padded':>10} {'padded/elastic':>15}",
    ]
    for label, pair, unit in cost_rows(results):
        ratio = pair["padded"] / pair["elastic"]
        shown = " ".join(f"{pair[kind] / unit:10,.1f}" for kind in ("elastic", "padded"))
        lines.append(f"{label:30} {shown} {ratio:14.2f}x")
    backend = serving("elastic_attention", "cpu", torch.float32)
    if backend == "eager":
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


def environment() -> dict[str, Any]:
    """Return what a reader needs to place the figures: machine, versions and commit."""
    from adatape_kernels import __version__

    repository = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "-C", repository, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "machine": f"{platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adatape_kernels": __version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
    }


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
