"""The options of `train` that decide the curve: defaults, checks and what is built of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import torch

from adatape_kernels.data import NAMES, augment
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig, AdaTapeViTOptions
from adatape_kernels.models.config import check_integer
from adatape_kernels.recipes.train_loop import Augment, TrainPlan

# The image sets whose images all have one size.
_FIXED_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32}

_DEFAULTS: dict[str, Any] = {
    "variant": None,
    "num_tape_tokens": 8,
    "topk": 4,
    "halt_threshold": 2.0,
    "batch": None,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "seed": 0,
    "limit": None,
    "drop_rest": False,
}

# The default batch, where the set has images enough for as many steps as these in an epoch.
_DEFAULT_BATCHES = {"digits": 48}
_DEFAULT_BATCH = 128
_LEAST_STEPS = 10
# Most numbers that the images of a batch consist of: 16 GiB in float32.
_MOST_BATCH_VALUES = 1 << 32

_DEFAULT_MODELS: dict[str, dict[str, int]] = {
    "digits": {"patch": 4, "bank_patch": 1, "dim": 64, "depth": 2, "heads": 4, "ffn": 128},
    "mnist": {"patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192},
    "fashion-mnist": {"patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192},
    "cifar10": {"patch": 4, "bank_patch": 4, "dim": 128, "depth": 6, "heads": 4, "ffn": 256},
    "imagefolder": {"patch": 8, "bank_patch": 8, "dim": 128, "depth": 6, "heads": 4, "ffn": 256},
}

_DEFAULT_TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 50, "lr": 3e-3},
    "mnist": {"epochs": 10},
    "fashion-mnist": {"epochs": 32},
    "cifar10": {"epochs": 30},
    "imagefolder": {"epochs": 30, "image_size": 64},
}

# Names that options have in checkpoints of version 0.1, by which such a run still resumes.
_FORMER_NAMES = {"tape": "num_tape_tokens", "threshold": "halt_threshold"}


@dataclass(frozen=True)
class TrainConfig:
    """What decides the curve, by the names of the command's options; saved with a checkpoint.

    Make one with `of`, which fills in defaults. Sizes of the model that are None are those of
    `variant`.
    """

    data: str
    """Name of the image set."""
    image_size: int
    """Side of an image in pixels."""
    variant: str | None
    """A ViT's size and patch size, as `adatape_vit` takes it."""
    patch: int | None
    """Side of an input patch in pixels."""
    bank_patch: int
    """Side of a bank patch in pixels."""
    dim: int | None
    """Width of a token."""
    depth: int | None
    """Number of encoder layers."""
    heads: int | None
    """Number of attention heads."""
    ffn: int | None
    """Hidden width of the feed-forward for input rows."""
    num_tape_tokens: int
    """Most tape tokens that an image reads."""
    topk: int
    """Number of bank tokens that are merged into one tape token."""
    halt_threshold: float
    """An image reads on while its halting score is below this."""
    epochs: int
    """Number of passes over the training images."""
    batch: int | None
    """Number of images in a step of the optimizer; None until `with_batch_for` chooses it."""
    lr: float
    """The highest learning rate."""
    weight_decay: float
    """AdamW's weight decay."""
    seed: int
    """Decides the split, the parameters, the order of the images and their augmentation."""
    limit: int | None
    """Number of training images that are used; None for all."""
    drop_rest: bool
    """Whether an epoch leaves out the images that do not fill a last batch. No option sets it: it
    is the case in runs of version 0.1 only, which go on as they began."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """Return a run's configuration, with the defaults of its image set.

        Args:
            options: values by field; absent or None where the default is wanted. "data" names the
                image set.

        Raises:
            ValueError: there is no such set, or an option is out of range.
        """
        name = options.get("data")
        if name not in NAMES:
            raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
        given = {key: value for key, value in options.items() if value is not None}
        defaults = {**_DEFAULTS, **_DEFAULT_MODELS[name], **_DEFAULT_TRAINING[name]}
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
            if field.type == int | None and value is None:
                continue
            if field.type in (int, int | None):
                check_integer(option_name(field.name), value, 0 if field.name == "seed" else 1)
        threshold = self.halt_threshold
        if not isinstance(threshold, Real) or not 0 < threshold < math.inf:
            raise ValueError(f"halt-threshold: expected a number above 0, got {threshold!r}")
        if not isinstance(self.drop_rest, bool):
            raise ValueError(f"drop-rest: expected true or false, got {self.drop_rest!r}")
        self.with_batch_for(1).plan()
        # The numbers of classes and channels come from the images, and any fit any model.
        self.vit_config(num_classes=1, in_channels=3)

    def with_batch_for(self, images: int) -> "TrainConfig":
        """Return the configuration with a batch, given or chosen, for so many training images.

        The default batch is that of the set, or fewer images where an epoch would otherwise have
        fewer than ten steps.

        Raises:
            ValueError: the images of a batch would take more than 16 GiB.
        """
        usual = _DEFAULT_BATCHES.get(self.data, _DEFAULT_BATCH)
        chosen = max(1, min(usual, images // _LEAST_STEPS))
        batch = chosen if self.batch is None else self.batch
        most = _MOST_BATCH_VALUES // (3 * self.image_size**2)
        if min(batch, images) > most:
            raise ValueError(
                f"image-size: expected a size at which a batch of {min(batch, images)} images "
                f"takes up to 16 GiB, got {self.image_size}"
            )
        return replace(self, batch=batch)

    def plan(self) -> TrainPlan:
        """Return how to train. Raises ValueError where no batch is chosen yet."""
        if self.batch is None:
            raise ValueError("batch: expected a number of images, got none")
        return TrainPlan(
            self.epochs,
            self.batch,
            self.lr,
            self.weight_decay,
            warmup_share=0.05,
            max_grad_norm=1.0,
            seed=self.seed,
            drop_rest=self.drop_rest,
        )

    def model(self, num_classes: int, in_channels: int) -> AdaTapeViT:
        """Return a new model. Raises ValueError where sizes do not fit."""
        return AdaTapeViT(self.vit_config(num_classes, in_channels))

    def vit_config(self, num_classes: int, in_channels: int) -> AdaTapeViTConfig:
        """Return the model's configuration. Raises ValueError where sizes do not fit."""
        options: AdaTapeViTOptions = {
            "bank_patch_size": self.bank_patch,
            "num_tape_tokens": self.num_tape_tokens,
            "topk": self.topk,
            "halt_threshold": self.halt_threshold,
            "key_split": 2,
            "pooling": "mean",
            "query": "gap",
            "image_size": self.image_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
        }
        if self.dim is not None:
            options["dim"] = self.dim
        if self.depth is not None:
            options["depth"] = self.depth
        if self.heads is not None:
            options["num_heads"] = self.heads
        if self.ffn is not None:
            options["ffn_dim"] = self.ffn
        if self.patch is not None:
            options["patch_size"] = self.patch
        return AdaTapeViTConfig.of(self.variant or f"Ti/{self.patch}", **options)

    def augmentation(self) -> Augment:
        """Return how training images are changed, in ways that leave their classes as they are."""
        # The pieces of Fashion-MNIST are all centred, so that a large shift only makes them harder.
        padding = {"mnist": 2, "fashion-mnist": 1}.get(self.data, max(1, self.image_size // 8))

        def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return augment.crop(images, padding, generator)

        def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return augment.flip(crop(images, generator), generator)

        if self.data == "digits":
            return augment.turn_and_move
        return crop if self.data == "mnist" else crop_and_flip


def option_name(field: str) -> str:
    """Return the command's option for a field of TrainConfig, without the leading dashes."""
    return field.replace("_", "-")


def with_present_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, of this version or of 0.1, as this version saves it."""
    present = {_FORMER_NAMES.get(name, name): value for name, value in saved.items()}
    return {"drop_rest": True, **present}
