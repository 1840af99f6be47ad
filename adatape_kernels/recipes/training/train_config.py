"""The options of `train` that decide the curve: defaults, checks and what is built of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from adatape_kernels.arguments import shown
from adatape_kernels.data import NAMES, augment
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AViTConfig, ImageClassifier, ViTConfig
from adatape_kernels.models.encoder_config import MOST_PARAMETERS
from adatape_kernels.models.factory import image_model
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.op_types import ACTIVATIONS
from adatape_kernels.recipes.training.drawn_thresholds import (
    ThresholdRange,
    as_threshold_range,
    check_nominal,
)
from adatape_kernels.recipes.training.execution import DTYPES
from adatape_kernels.recipes.training.loading_options import (
    LOADING_OPTIONS,
    LoadingOptions,
    check_loading_option,
)
from adatape_kernels.recipes.training.model_options import (
    BEGINNINGS,
    HALTING_OPTIONS,
    SIZES_OF_A_VARIANT,
    ModelOptions,
    check_beginning,
    check_given,
    with_beginnings,
)
from adatape_kernels.recipes.training.named_recipes import PLAN_FIELDS, recipe_values, with_recipe
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_defaults import (
    DEFAULT_BATCH,
    DEFAULT_BATCHES,
    DEFAULT_MODELS,
    DEFAULT_TRAINING,
    DEFAULTS,
    FINE_TUNING,
    FIXED_SIDES,
    LEAST_STEPS,
    OF_A_MODEL,
)
from adatape_kernels.recipes.training.train_loop import Augment
from adatape_kernels.recipes.training.train_plan import MOST_EPOCHS, TrainPlan
from adatape_kernels.recipes.training.training_options import (
    TRAINING_OPTIONS,
    TrainingOptions,
    check_training_option,
)

# Most numbers that the images of a batch consist of: 16 GiB in float32.
_MOST_BATCH_VALUES = 1 << 32

# Names that options have in checkpoints of version 0.1, by which such a run still resumes.
_FORMER_NAMES = {"tape": "num_tape_tokens", "threshold": "halt_threshold"}
# Options that version 0.1 did not have, whose defaults are what it did.
_NEW_NAMES = ("activation", "bank", "bank_size", "split_seed", "source")
# Options that runs of a checkpoint's present format may lack, whose defaults are what they did.
_ADDED_NAMES = (
    "model_name",
    "halt_threshold_range",
    "dtype",
    "init",
    *HALTING_OPTIONS,
    *TRAINING_OPTIONS,
    *LOADING_OPTIONS,
)


@dataclass(frozen=True)
class TrainConfig(ModelOptions, TrainingOptions, LoadingOptions):
    """What decides the curve, by the names of the command's options; saved with a checkpoint.

    Make one with `of`, which fills in defaults.
    """

    data: str
    """Name of the image set."""
    epochs: int
    """Number of passes over the training images."""
    batch: int | None
    """Number of images in a step of the optimizer, None until `with_batch_for` chooses it."""
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
    split_seed: int | None
    """Decides the split and the `limit` in the place of `seed`; None for `seed` itself."""
    halt_threshold_range: ThresholdRange | None
    """Draw the halting threshold of each training step from this range, so that the model can be
    run at any; it is tested at `halt_threshold`; None for that one in all steps."""
    dtype: str
    """What products are computed in: float32, or bf16 by autocast; the parameters are float32."""

    @classmethod
    def of(cls, options: Mapping[str, Any], source: SourceFile | None = None) -> "TrainConfig":
        """Return a run's configuration, with the defaults of its image set.

        Args:
            options: values by field; absent or None where the default is wanted. "data" names the
                image set.
            source: the pretrained ViT to begin with, whose sizes are the model's.

        Raises:
            ValueError: there is no such set, or an option is out of range, not as in the source, or
                of no effect without another.
        """
        name = _known_set(options.get("data"))
        _check_names(options)
        given = {key: value for key, value in options.items() if value is not None}
        model = given.get("model_name", DEFAULTS["model_name"])
        check_given(model, {**given, "source": source})
        defaults = {**DEFAULTS, **DEFAULT_MODELS[name], **DEFAULT_TRAINING[name]}
        defaults |= OF_A_MODEL.get(model, {})
        if "recipe" in given:
            if source is not None:
                raise ValueError(f"recipe: expected none with a source, got {given['recipe']!r}")
            defaults |= recipe_values(check_training_option("recipe", given["recipe"]), name)
        named = image_model(model)
        if "bank" in named.choices:
            defaults["bank"] = named.choices["bank"]
        if named.config is AViTConfig:
            defaults["activation"] = AViTConfig.activation
        if name in FIXED_SIDES:
            defaults["image_size"] = FIXED_SIDES[name]
        if source is not None:
            defaults |= _of_source(source, given, defaults)
        elif "variant" in given or named.variant is not None:
            defaults |= {**dict.fromkeys(SIZES_OF_A_VARIANT), "variant": None}
        elif defaults["variant"] is not None:  # that of a recipe
            defaults |= dict.fromkeys(SIZES_OF_A_VARIANT)
        config = cls(**{**defaults, **given}).checked()
        # A whole configuration may be given, which holds the default.
        differs = config.randaugment_magnitude != defaults["randaugment_magnitude"]
        if differs and not config.randaugment:
            raise ValueError(
                "randaugment-magnitude: expected none without --randaugment, got "
                f"{config.randaugment_magnitude}"
            )
        return config

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> "TrainConfig":
        """Return a configuration that was saved, all of whose fields are there.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        _check_names(saved)
        saved = {**{name: DEFAULTS[name] for name in _ADDED_NAMES}, **saved}
        for field in fields(cls):
            if field.name not in saved:
                raise ValueError(f"{option_name(field.name)}: expected a value, got none")
        return cls(**with_beginnings(saved)).checked()

    def checked(self) -> "TrainConfig":
        """Return the configuration with numbers of Python's own types.

        Raises:
            ValueError: a value is out of range. No data is read for that.
        """
        _known_set(self.data)
        config = replace(self, **{n: check_option(n, getattr(self, n)) for n in _KINDS})
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where a value is out of range, before any data is read."""
        _known_set(self.data)
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


def _of_source(
    source: SourceFile, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the defaults of a run that begins with a source.

    Raises:
        ValueError: an option is not as in the source.
    """
    decided = source.options()
    for name, value in given.items():
        if name == "variant" or (name in decided and value != decided[name]):
            raise ValueError(
                f"{option_name(name)}: expected {decided.get(name, 'none')}, as in "
                f"{printable(source.path)}, got {shown(value)}"
            )
    bank_patch = defaults["bank_patch"]
    if decided["image_size"] % bank_patch:
        bank_patch = source.config.bank_patch_size
    return {**decided, **FINE_TUNING, "bank_patch": bank_patch, "source": source.facts}


def option_name(field: str) -> str:
    """Return the command's option for a field of TrainConfig, without the leading dashes."""
    return "model" if field == "model_name" else field.replace("_", "-")


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None, numbers in Python's own types.

    Raises:
        ValueError: one is no field of TrainConfig, or its type or range is not the field's.
    """
    _check_names(options)
    return {n: check_option(n, value) for n, value in options.items() if value is not None}


def check_option(field: str, value: object) -> Any:
    """Return a value of a field of TrainConfig, numbers in Python's own types.

    Raises:
        ValueError: the value's type or range is not that of the field, whatever the others are.
    """
    if field in TRAINING_OPTIONS:
        return check_training_option(field, value)
    if field in LOADING_OPTIONS:
        return check_loading_option(field, value)
    name, kind = option_name(field), _KINDS[field]
    if value is None and (field in HALTING_OPTIONS or kind in _MAY_BE_NONE):
        return None
    if kind == ThresholdRange | None:
        return as_threshold_range(name, value)
    if field in _OF_ANY_SIZE:  # the model's configuration knows their ranges
        return as_number(name, value)
    if kind in (int, int | None):
        least, most = _RANGES.get(field, (1, MOST_PARAMETERS))
        return as_integer(name, as_integer(name, value, least), least, most)
    if kind is float:
        expected = "0 or more" if field == "weight_decay" else "a number above 0"
        number = as_number(name, value, expected)
        if not 0 <= number < math.inf or (number == 0 and field != "weight_decay"):
            raise ValueError(f"{name}: expected {expected}, got {number}")
        return number
    if kind is bool:
        as_flag(name, value)
    elif field == "activation":
        as_choice(name, value, ACTIVATIONS)
    elif field == "bank":
        as_choice(name, value, ("input", "learn"))
    elif field == "dtype":
        as_choice("dtype", value, DTYPES)
    elif field in ("act_level", "leave"):
        as_choice(name, value, ("example", "row"))
    elif field == "model_name":
        image_model(value)
    elif field in BEGINNINGS:
        check_beginning(field, value)
    elif not isinstance(value, str):
        raise ValueError(f"{name}: expected a name, got {shown(value)}")
    return value


_KINDS: dict[str, Any] = {field.name: field.type for field in fields(TrainConfig)}
_MAY_BE_NONE = (int | None, str | None, ThresholdRange | None)
_RANGES = {
    "seed": (0, (1 << 32) - 1),
    "split_seed": (0, (1 << 32) - 1),
    "epochs": (1, MOST_EPOCHS),
    "num_tape_tokens": (0, MOST_PARAMETERS),
    "distinct_layers": (0, MOST_PARAMETERS),
}
_OF_ANY_SIZE = (
    "act_epsilon",
    "gate_scale",
    "gate_center",
    "ponder_weight",
    "distribution_weight",
)


def _known_set(name: object) -> str:
    """Return the name of an image set; raise ValueError if it is none."""
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {shown(name)}")
    return name


def _check_names(options: Mapping[str, Any]) -> None:
    """Raise ValueError where an option is no field of TrainConfig."""
    for name in options:
        if name not in _KINDS:
            raise ValueError(f"options: expected a field of TrainConfig, got {shown(name)}")


def with_present_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that a checkpoint of format 1 holds, as this version saves it."""
    present = {_FORMER_NAMES.get(name, name): value for name, value in saved.items()}
    return {"drop_rest": True, **{name: DEFAULTS[name] for name in _NEW_NAMES}, **present}
