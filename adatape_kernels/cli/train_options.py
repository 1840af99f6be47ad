"""The options of `train` that decide a curve, as `train` and `finetune` take them."""

from dataclasses import dataclass, fields
from typing import Any

from adatape_kernels.cli.option_parser import option, taken_from
from adatape_kernels.recipes.training.model_options import ModelOptions
from adatape_kernels.recipes.training.named_recipes import RECIPES
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_defaults import (
    DEFAULT_MODELS,
    DEFAULT_TRAINING,
    DEFAULTS,
    FINE_TUNING,
)
from adatape_kernels.recipes.training.training_options import TrainingOptions

_NAMES = {field.name for field in fields(TrainConfig)}
# No option sets these, or they are another thing on the command line than in a configuration.
_NAMES -= {"drop_rest", "draws", "source", "init", "data", "unreadable", "unreadable_limit"}
_SPELLED = {"model_name": "model"}

# What is not in the tables of defaults.
_UNSET = {
    "batch": "chosen by the number of images, or by --recipe",
    "limit": "all",
    "split_seed": "that of --seed",
    "variant": "none, or by --recipe",
    "recipe": "none",
    "halt_threshold_range": "none",
    "image_size": "decided by --data and --recipe",
}


def _unset(field: str) -> str:
    """Return what decides a field of TrainConfig where no option does, in words."""
    if field in _UNSET:
        return _UNSET[field]
    tables = (*DEFAULT_MODELS.values(), *DEFAULT_TRAINING.values())
    recipes = [values for sets in RECIPES.values() for values in sets.values()]
    deciding = {
        "--data": any(field in table for table in tables),
        "--recipe": any(field in values for values in recipes),
        "--source": field in FINE_TUNING,
    }
    others = [name for name, decides in deciding.items() if decides]
    if deciding["--data"]:
        return f"decided by {', '.join(others)}"
    if DEFAULTS[field] is None:
        return "the model's own"
    return f"{DEFAULTS[field]}{', or by --recipe' if others else ''}"


def _group(config: type, group: str, names: set[str]) -> Any:
    unset = {name: _unset(name) for name in names}
    return taken_from(config, names, group=group, spelled=_SPELLED, unset=unset)


_OF_THE_MODEL = {field.name for field in fields(ModelOptions)} & _NAMES
_OF_THE_LOSS = {field.name for field in fields(TrainingOptions)} & _NAMES

_Model: Any = _group(
    ModelOptions, "model, by default a small one that suits the set", _OF_THE_MODEL
)
_Loss: Any = _group(TrainingOptions, "loss and regularisation", _OF_THE_LOSS)
_Rest: Any = _group(
    TrainConfig,
    "training, by default what suits the set",
    _NAMES - _OF_THE_MODEL - _OF_THE_LOSS,
)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which images are trained on."""

    data: str | None = option(None, metavar="SET")
    """The image set: digits, fashion-mnist, mnist, cifar10, imagefolder or shards."""
    data_dir: str | None = option(
        None, metavar="FOLDER", unset="none; for fashion-mnist where Debian's package puts them"
    )
    """The set's files."""


@dataclass(frozen=True, kw_only=True)
class CurveOptions(_Loss, _Rest, _Model):
    """What decides a curve, by the fields of TrainConfig, each of which may be left out."""


def curve_values(options: Any) -> dict[str, Any]:
    """Return values by field of TrainConfig, None where an option is not given."""
    names = (*sorted(_NAMES), "data", "unreadable", "unreadable_limit")
    return {name: getattr(options, _SPELLED.get(name, name)) for name in names}
