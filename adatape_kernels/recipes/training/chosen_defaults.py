"""The defaults of a run, by its image set, its model, its recipe and what it begins with."""

from collections.abc import Mapping
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AViTConfig
from adatape_kernels.models.factory import image_model
from adatape_kernels.recipes.training.model_options import SIZES_OF_A_VARIANT
from adatape_kernels.recipes.training.named_recipes import recipe_values
from adatape_kernels.recipes.training.option_checks import option_name
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_defaults import (
    DEFAULT_MODELS,
    DEFAULT_TRAINING,
    DEFAULTS,
    FINE_TUNING,
    FIXED_SIDES,
    OF_A_MODEL,
)
from adatape_kernels.recipes.training.training_options import check_training_option


def defaults_of(given: Mapping[str, Any], source: SourceFile | None) -> dict[str, Any]:
    """Return what the options of a run are where they are not given.

    Args:
        given: values by field of TrainConfig, of which "data" is one.
        source: the pretrained ViT to begin with, if there is one.

    Raises:
        ValueError: an option is not as in the source, or there is no such recipe.
    """
    name, model = given["data"], given.get("model_name", DEFAULTS["model_name"])
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
    return defaults


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
