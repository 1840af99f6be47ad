"""Train AdaTape on an image set from local files, with checkpoints, and report as the demo does."""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from adatape_kernels import __version__
from adatape_kernels.data import NAMES, ImageSet, Normaliser, augment, load
from adatape_kernels.models import AdaTapeViT, adatape_vit
from adatape_kernels.ops.op import current_backend, serving
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.report import Results, write_report
from adatape_kernels.recipes.training import (
    Augment,
    EpochResult,
    Plan,
    accuracy,
    predict,
    train,
)

ROUNDS = 7
METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_accuracy",
    "mean_tape_length",
    "images_per_second",
    "learning_rate",
)


@dataclass(frozen=True)
class Config:
    """What decides the curve, by the names of the command's options; saved with a checkpoint.

    None leaves a size of the model to `variant`, and `limit` to the whole training set.
    """

    data: str
    image_size: int
    variant: str | None
    patch: int | None
    bank_patch: int
    dim: int | None
    depth: int | None
    heads: int | None
    ffn: int | None
    tape: int
    topk: int
    threshold: float
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    seed: int
    limit: int | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Config":
        """Fill in the defaults of the set that options["data"] names.

        Raises:
            ValueError: there is no such set, or an option is out of range.
        """
        name = options.get("data")
        if name not in NAMES:
            raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
        given = {key: value for key, value in options.items() if value is not None}
        defaults = {**_DEFAULTS["any"], **_DEFAULTS[name]}
        fixed = _FIXED_SIDES.get(name)
        if fixed and given.setdefault("image_size", fixed) != fixed:
            raise ValueError(
                f"image-size: expected {fixed}, the size of {name}, got {given['image_size']}"
            )
        if "variant" in given:
            defaults |= dict.fromkeys(("dim", "depth", "heads", "ffn", "patch"))
        config = cls(**{**defaults, **given})
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where a value is out of range, before any data is read."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and field.name != "seed" and value is not None:
                if value < 1:
                    option = field.name.replace("_", "-")
                    raise ValueError(f"{option}: expected 1 or more, got {value}")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold: expected a number above 0, got {self.threshold}")
        self.plan()

    def plan(self) -> Plan:
        """Return how to train."""
        return Plan(
            self.epochs,
            self.batch,
            self.lr,
            self.weight_decay,
            warmup_share=0.05,
            max_grad_norm=1.0,
            seed=self.seed,
        )

    def model(self, num_classes: int, in_channels: int) -> AdaTapeViT:
        """Return a new model. Raises ValueError where sizes do not fit."""
        options: dict[str, Any] = {
            "dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "ffn_dim": self.ffn,
            "patch_size": self.patch,
            "bank_patch_size": self.bank_patch,
            "num_tape_tokens": self.tape,
            "topk": self.topk,
            "halt_threshold": self.threshold,
            "key_split": 2,
            "pooling": "mean",
            "query": "gap",
            "image_size": self.image_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return adatape_vit(self.variant or f"Ti/{self.patch}", **given)


_FIXED_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "any": {
        "variant": None,
        "tape": 8,
        "topk": 4,
        "threshold": 2.0,
        "batch": 128,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "seed": 0,
        "limit": None,
    },
    "digits": {
        "patch": 4, "bank_patch": 1, "dim": 64, "depth": 2, "heads": 4, "ffn": 128,
        "epochs": 50, "batch": 48, "lr": 3e-3,
    },
    "mnist": {
        "patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192, "epochs": 10,
    },
    "fashion-mnist": {
        "patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192, "epochs": 32,
    },
    "cifar10": {
        "patch": 4, "bank_patch": 4, "dim": 128, "depth": 6, "heads": 4, "ffn": 256, "epochs": 30,
    },
    "imagefolder": {
        "patch": 8, "bank_patch": 8, "dim": 128, "depth": 6, "heads": 4, "ffn": 256, "epochs": 30,
        "image_size": 64,
    },
}  # fmt: skip


def augmentation(config: Config) -> Augment:
    """Return how training images of the set are changed: what leaves their class as it is."""
    # Fashion-MNIST's pieces all stand in the middle: learning to find them far from it only costs.
    padding = {"mnist": 2, "fashion-mnist": 1}.get(config.data, max(1, config.image_size // 8))

    def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment.crop(images, padding, generator)

    def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment.flip(crop(images, generator), generator)

    if config.data == "digits":
        return augment.turn_and_move
    return crop if config.data == "mnist" else crop_and_flip


def run(
    out: str | Path,
    options: Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    resume: bool = False,
) -> Results:
    """Train, or go on with a run, and write its report into `out`.

    `out` receives checkpoint.json and its safetensors after each epoch, metrics.csv with a row for
    each, and in the end what the demo writes.

    Args:
        out: a new or empty folder, or one that holds a run to resume.
        options: entries of Config by name; None or absent for the default, or on resume for what
            the run was started with.
        data_dir: the image set's folder, as in `data.load`; on resume None is where it was.
        resume: go on from the folder's checkpoint.

    Raises:
        ValueError: an option, the image set, or the checkpoint is not what was expected.
        RuntimeError: a package is missing, or the loss is not finite.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: interrupted; says what `out` holds.
    """
    pictures.require("train")
    out = Path(out)
    saved = _saved(out, options) if resume else None
    if saved is None:
        _refuse_to_overwrite(out)
        config = Config.of(options)
    else:
        config = _saved_config(out, saved)
        data_dir = data_dir or saved.environment.get("data_dir")
    data = load(config.data, data_dir, image_size=config.image_size, seed=config.seed)
    if config.limit is not None:
        data = data.limited(config.limit, config.seed)
    normalise = Normaliser.of(data.train_images)
    plan = config.plan()
    torch.manual_seed(config.seed)
    model = config.model(data.num_classes, len(normalise.mean))
    optimizer = plan.optimizer(model)
    facts, environment = _facts(data, normalise), _environment(data_dir)
    steps = plan.steps_per_epoch(len(data.train_labels))

    def save(rows: list[dict[str, Any]]) -> None:
        tensors = checkpoint.tensors_of(model, optimizer)
        done = len(rows)
        checkpoint.save(
            out,
            Checkpoint(done, done * steps, asdict(config), facts, rows, environment, tensors),
        )
        checkpoint.write_file(out / "metrics.csv", _metrics_csv(rows))

    history: list[dict[str, Any]] = []
    if saved is None:
        out.mkdir(parents=True, exist_ok=True)
        save(history)  # a folder that cannot be written shows before any training
    else:
        _check_facts(out, saved, facts)
        checkpoint.restore(out, saved.tensors, model, optimizer)
        history = saved.history
        _note_differences(saved, environment)

    def after_epoch(result: EpochResult) -> str:
        output = predict(model, data.test_images, normalise)
        row = dict(
            zip(
                METRICS,
                (
                    result.epoch,
                    result.loss,
                    result.accuracy,
                    accuracy(output, data.test_labels),
                    output.tape_lens.double().mean().item(),
                    result.images_per_second,
                    result.learning_rate,
                ),
                strict=True,
            )
        )
        save([*history, row])
        history.append(row)
        return _line(row, plan.epochs)

    try:
        train(
            model,
            data,
            plan,
            normalise,
            augmentation(config),
            optimizer=optimizer,
            epochs_done=len(history),
            title=f"training on {config.data}",
            after_epoch=after_epoch,
        )
        entries = {"config": asdict(config), "data": facts, "metrics": history}
        return write_report(out, model, data, normalise, entries, rounds=ROUNDS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{out} holds epoch {len(history)} of {plan.epochs}; --resume goes on from there"
        ) from None


def _refuse_to_overwrite(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    found = min((inner.name for inner in out.iterdir()), default=None) if out.exists() else None
    if (out / checkpoint.INDEX).exists():
        raise ValueError(f"out: expected a new folder, or --resume, got {out}, which holds a run")
    if found is not None:
        raise ValueError(f"out: expected a new or empty folder, got {out}, which holds {found}")


def _saved(out: Path, options: Mapping[str, Any]) -> Checkpoint:
    """Load the run's checkpoint, and refuse options that are not the run's."""
    saved = checkpoint.load(out)
    for field in fields(Config):
        given = options.get(field.name)
        if given is not None and given != saved.config.get(field.name):
            raise ValueError(
                f"{field.name.replace('_', '-')}: expected {saved.config.get(field.name)}, as in "
                f"{out / checkpoint.INDEX}, got {given}"
            )
    return saved


def _saved_config(out: Path, saved: Checkpoint) -> Config:
    file = out / checkpoint.INDEX
    try:
        config = Config(**saved.config)
        config.check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the options of a run, got {error}") from None
    if any(type(row) is not dict or tuple(row) != METRICS for row in saved.history):
        raise ValueError(f"{file}: expected {', '.join(METRICS)} for each epoch, got others")
    return config


def _facts(data: ImageSet, normalise: Normaliser) -> dict[str, Any]:
    """Return by what a set is recognised, in the types that JSON gives back."""
    return {
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "class_names": list(data.class_names),
        "mean": list(normalise.mean),
        "std": list(normalise.std),
    }


def _check_facts(out: Path, saved: Checkpoint, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if saved.data.get(name) != value:
            raise ValueError(
                f"data-dir: expected the images of {out / checkpoint.INDEX} with {name} "
                f"{saved.data.get(name)}, got {value}"
            )


def _environment(data_dir: str | Path | None) -> dict[str, Any]:
    return {
        "adatape_kernels": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": current_backend() or serving("elastic_attention", "cpu", torch.float32),
        "data_dir": None if data_dir is None else str(Path(data_dir).resolve()),
    }


def _note_differences(saved: Checkpoint, environment: Mapping[str, Any]) -> None:
    """Say on stderr what may change the last bits of the curve from here on."""
    for name, value in environment.items():
        before = saved.environment.get(name)
        if name != "data_dir" and value != before:
            print(
                f"adatape-kernels: note: {name} was {before} and is {value}; "
                "the curve may differ in the last bits",
                file=sys.stderr,
            )


def _metrics_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _line(row: Mapping[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, "
        f"train {row['train_accuracy']:.2%}, test {row['test_accuracy']:.2%}, "
        f"tape {row['mean_tape_length']:.2f}, {row['images_per_second']:,.0f} images/s"
    )
