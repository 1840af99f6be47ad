"""The checks of one option of `train`, whatever the others are: its type and its range."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.data import NAMES
from adatape_kernels.models.encoder_config import MOST_PARAMETERS
from adatape_kernels.models.factory import image_model
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.op_types import ACTIVATIONS
from adatape_kernels.recipes.training.curve_fields import CurveFields
from adatape_kernels.recipes.training.drawn_thresholds import ThresholdRange, as_threshold_range
from adatape_kernels.recipes.training.execution import DTYPES
from adatape_kernels.recipes.training.loading_options import LOADING_OPTIONS, check_loading_option
from adatape_kernels.recipes.training.model_options import (
    BEGINNINGS,
    HALTING_OPTIONS,
    check_beginning,
)
from adatape_kernels.recipes.training.train_plan import MOST_EPOCHS
from adatape_kernels.recipes.training.training_options import (
    TRAINING_OPTIONS,
    check_training_option,
)

_KINDS: dict[str, Any] = {field.name: field.type for field in fields(CurveFields)}
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


def option_name(field: str) -> str:
    """Return the command's option for a field of TrainConfig, without the leading dashes."""
    return "model" if field == "model_name" else field.replace("_", "-")


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None, numbers in Python's own types.

    Raises:
        ValueError: one is no field of TrainConfig, or its type or range is not the field's.
    """
    check_names(options)
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


def known_set(name: object) -> str:
    """Return the name of an image set; raise ValueError if it is none."""
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {shown(name)}")
    return name


def check_names(options: Mapping[str, Any]) -> None:
    """Raise ValueError where an option is no field of TrainConfig."""
    for name in options:
        if name not in _KINDS:
            raise ValueError(f"options: expected a field of TrainConfig, got {shown(name)}")
