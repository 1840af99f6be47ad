"""The options of `train` that decide the curve: what is built of them, and whether they fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from adatape_kernels.data import augment
from adatape_kernels.models import ImageClassifier, ViTConfig
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.training.chosen_defaults import defaults_of
from adatape_kernels.recipes.training.curve_fields import CurveFields
from adatape_kernels.recipes.training.drawn_thresholds import check_nominal
from adatape_kernels.recipes.training.model_options import (
    HALTING_OPTIONS,
    SIZES_OF_A_VARIANT,
    check_given,
)
from adatape_kernels.recipes.training.named_recipes import PLAN_FIELDS, recipe_values, with_recipe
from adatape_kernels.recipes.training.option_checks import (
    check_names,
    check_option,
    known_set,
    option_name,
)
from adatape_kernels.recipes.training.saved_options import completed
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_defaults import (
    DEFAULT_BATCH,
    DEFAULT_BATCHES,
    DEFAULTS,
    FIXED_SIDES,
    LEAST_STEPS,
)
from adatape_kernels.recipes.training.train_loop import Augment
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.unused_options import check_used

# Most numbers that the images of a batch consist of: 16 GiB in float32.
_MOST_BATCH_VALUES = 1 << 32


@dataclass(frozen=True)
class TrainConfig(CurveFields):
    """What decides the curve, by the names of the command's options; saved with a checkpoint.

    Make one with `of`, which fills in defaults.
    """

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        source: SourceFile | None = None,
        *,
        usual: Mapping[str, Any] | None = None,
    ) -> "TrainConfig":
        """Return a run's configuration, with the defaults of its image set.

        Args:
            options: values by field; absent or None where the default is wanted. "data" names the
                image set.
            source: the pretrained ViT to begin with, whose sizes are the model's.
            usual: values among them that nobody has asked for, as those of a model to begin with,
                and that may therefore be of no effect.

        Raises:
            ValueError: there is no such set, or an option is out of range, not as in the source, or
                of no effect beside the others.
        """
        known_set(options.get("data"))
        check_names(options)
        given = {key: value for key, value in options.items() if value is not None}
        model = given.get("model_name", DEFAULTS["model_name"])
        check_given(model, {**given, "source": source})
        defaults = defaults_of(given, source)
        config = cls(**{**defaults, **given}).checked()
        unasked = {name: check_option(name, value) for name, value in (usual or {}).items()}
        check_used(config, given, {**defaults, **unasked})
        return config

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> "TrainConfig":
        """Return a configuration that was saved, all of whose fields are there.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        return cls(**completed(saved)).checked()

    def checked(self) -> "TrainConfig":
        """Return the configuration with numbers of Python's own types.

        Raises:
            ValueError: a value is out of range. No data is read for that.
        """
        known_set(self.data)
        values = {
            each.name: check_option(each.name, getattr(self, each.name)) for each in fields(self)
        }
        config = replace(self, **values)
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where a value is out of range, before any data is read."""
        known_set(self.data)
        for field in fields(self):
            check_option(field.name, getattr(self, field.name))
        fixed = FIXED_SIDES.get(self.data, self.image_size)
        if self.image_size != fixed:
            raise ValueError(
                f"image-size: expected {fixed}, the size of {self.data}, got {self.image_size}"
            )
        if self.recipe is not None:
            recipe_values(self.recipe, self.data)
        self.check_set(self.data)
        of_some = (*HALTING_OPTIONS, "variant", "source")
        check_given(self.model_name, {name: getattr(self, name) for name in of_some})
        if not self.has_variant:
            for name in SIZES_OF_A_VARIANT:
                as_integer(option_name(name), getattr(self, name), 1)
        if self.halt_threshold_range is not None:
            check_nominal("halt-threshold", self.halt_threshold, self.halt_threshold_range)
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
        usual = DEFAULT_BATCHES.get(self.data, DEFAULT_BATCH)
        chosen = max(1, min(usual, images // LEAST_STEPS))
        batch = chosen if self.batch is None else self.batch
        most = _MOST_BATCH_VALUES // (3 * self.image_size**2)
        if (count := min(batch, images)) > most:
            raise ValueError(
                f"image-size: expected a size at which a batch of {count} image{'s' * (count > 1)} "
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
            label_smoothing=self.label_smoothing,
            warmup_share=self.warmup_share,
            max_grad_norm=self.max_grad_norm or math.inf,
            seed=self.seed,
            drop_rest=self.drop_rest,
            loss=self.loss,
            mixup=self.mixup,
            **PLAN_FIELDS.get(self.recipe, {}),
            halt_threshold_range=self.halt_threshold_range,
        )

    def model(
        self, num_classes: int, in_channels: int, source: SourceFile | None = None
    ) -> ImageClassifier:
        """Return a new model, as `ModelOptions.model`, whose new head is that of the loss."""
        model = super().model(num_classes, in_channels, source)
        if source is None or source.num_classes != num_classes:
            self.start_head(model.head)
        return model

    def vit_config(self, num_classes: int, in_channels: int) -> ViTConfig:
        """Return `ModelOptions.vit_config`, with the fields that the recipe decides."""
        return with_recipe(super().vit_config(num_classes, in_channels), self.recipe)

    @property
    def split(self) -> int:
        """The seed of the split and of the choice of images under a `limit`."""
        return self.seed if self.split_seed is None else self.split_seed

    def augmentation(self) -> Augment:
        """Return how training images are changed, in ways that leave their classes as they are."""
        # The pieces of Fashion-MNIST are all centred, so that a large shift only makes them harder.
        padding = {"mnist": 2, "fashion-mnist": 1}.get(self.data, max(1, self.image_size // 8))

        def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return augment.crop(images, padding, generator)

        def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return augment.flip(crop(images, generator), generator)

        usual = {"digits": augment.turn_and_move, "mnist": crop}
        return self.regularised(usual.get(self.data, crop_and_flip))
