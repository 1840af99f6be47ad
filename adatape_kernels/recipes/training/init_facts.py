"""What a run keeps of the model that `train --init` began it with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.models import AdaTapeViTConfig, ViTConfig

OPTIONS = {
    "image_size": "image_size",
    "patch_size": "patch",
    "dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "ffn_dim": "ffn",
    "activation": "activation",
    "bank": "bank",
    "bank_size": "bank_size",
    "bank_patch_size": "bank_patch",
    "num_tape_tokens": "num_tape_tokens",
    "topk": "topk",
    "halt_threshold": "halt_threshold",
    "act_epsilon": "act_epsilon",
    "act_level": "act_level",
    "leave": "leave",
    "distinct_layers": "distinct_layers",
    "gate_scale": "gate_scale",
    "gate_center": "gate_center",
    "ponder_weight": "ponder_weight",
    "distribution_weight": "distribution_weight",
}
"""The fields of models' configurations that an option of `train` decides, and that option."""
OF_THE_IMAGES = ("num_classes", "in_channels")
"""The fields that the images decide."""
_FIELDS = re.compile(rf"\b({'|'.join(OPTIONS)})\b")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class InitFacts:
    """Which file a run began with, and what it decides about the model that no option does."""

    name: str
    """The name of the file, or of the run's folder, without those around it."""
    sha256: str
    """The hash of the file that held the parameters."""
    fields: Mapping[str, Any]
    """Fields of the model's configuration that no option of `train` sets."""

    def __post_init__(self) -> None:
        """Check the types; the model's configuration checks its own fields."""
        if not isinstance(self.name, str):
            raise ValueError(f"init: expected a name, got {shown(self.name)}")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"init: expected a SHA-256, got {shown(self.sha256)}")
        if not isinstance(self.fields, Mapping):
            raise ValueError(f"init: expected fields of a model, got {shown(self.fields)}")
        for name in self.fields:
            if not isinstance(name, str) or name in OPTIONS or name in OF_THE_IMAGES:
                raise ValueError(f"init: expected fields that no option sets, got {shown(name)}")

    @classmethod
    def of_saved(cls, saved: object) -> "InitFacts":
        """Return facts that a checkpoint holds. Raises ValueError where they are none."""
        names = [field.name for field in fields(cls)]
        if not isinstance(saved, Mapping) or set(saved) != {*names}:
            raise ValueError(f"init: expected {', '.join(names)}, got {shown(saved)}")
        found = saved["fields"]
        if isinstance(found, Mapping) and isinstance(found.get("read_layers"), list):
            found = {**found, "read_layers": tuple(found["read_layers"])}
        return cls(saved["name"], saved["sha256"], found)


def in_options(words: str) -> str:
    """Return an error of a model's configuration with the options in the place of its fields.

    Example:
        >>> in_options("num_heads: expected a divisor of dim = 32, got 3")
        'heads: expected a divisor of dim = 32, got 3'
    """
    return _FIELDS.sub(lambda found: OPTIONS[found[0]].replace("_", "-"), words)


def fields_without_option(config: ViTConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration that neither an option nor the images decide."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in OPTIONS and field.name not in OF_THE_IMAGES
    }


def options_of(config: ViTConfig) -> dict[str, Any]:
    """Return a model's configuration as options of `train`, as far as these say it."""
    named = {field.name for field in fields(config)}
    options = {option: getattr(config, name) for name, option in OPTIONS.items() if name in named}
    if isinstance(config, AdaTapeViTConfig) and not config.read_layers:
        options["num_tape_tokens"] = 0
    return options
