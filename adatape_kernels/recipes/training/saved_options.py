"""Options as checkpoints of this version and of earlier ones hold them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adatape_kernels.recipes.training.curve_fields import CurveFields
from adatape_kernels.recipes.training.loading_options import LOADING_OPTIONS
from adatape_kernels.recipes.training.model_options import HALTING_OPTIONS, with_beginnings
from adatape_kernels.recipes.training.option_checks import check_names, option_name
from adatape_kernels.recipes.training.train_defaults import DEFAULTS
from adatape_kernels.recipes.training.training_options import TRAINING_OPTIONS

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


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options with those that its version did not have.

    Raises:
        ValueError: a field of TrainConfig is missing, or one is unknown.
    """
    check_names(saved)
    saved = {**{name: DEFAULTS[name] for name in _ADDED_NAMES}, **saved}
    for field in fields(CurveFields):
        if field.name not in saved:
            raise ValueError(f"{option_name(field.name)}: expected a value, got none")
    return with_beginnings(saved)


def with_present_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that a checkpoint of format 1 holds, as this version saves it."""
    present = {_FORMER_NAMES.get(name, name): value for name, value in saved.items()}
    return {"drop_rest": True, **{name: DEFAULTS[name] for name in _NEW_NAMES}, **present}
