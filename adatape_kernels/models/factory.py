"""Models by name, as timm has them: `create_model` and `list_models`."""

import dataclasses
import difflib
import fnmatch
from typing import Any, NamedTuple

from adatape_kernels.arguments import shown
from adatape_kernels.models.classifier import Classifier
from adatape_kernels.models.compared import (
    AViT,
    AViTConfig,
    Transformer,
    TransformerConfig,
    UniversalTransformer,
    UniversalTransformerConfig,
    UViT,
    UViTConfig,
    ViT,
)
from adatape_kernels.models.encoder_config import EncoderConfig
from adatape_kernels.models.image_config import SIZES, ViTConfig
from adatape_kernels.models.parity import AdaTapeParity, AdaTapeParityConfig
from adatape_kernels.models.vit import AdaTapeViT, AdaTapeViTConfig

_SIZE_NAMES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}
_PATCHES = (16, 32)
_NEAR = 3


class _Entry(NamedTuple):
    """A model by name: its class, and its configuration's class, sizes and choices."""

    model: type[Classifier]
    config: type[EncoderConfig]
    size: str
    patch: int | None
    choices: dict[str, Any]


_IMAGE_MODELS: dict[str, tuple[type[Classifier], type[ViTConfig], dict[str, Any]]] = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {}),
    "avit": (AViT, AViTConfig, {}),
    "u2t": (UViT, UViTConfig, {"distinct_layers": 2}),
    "uvit": (UViT, UViTConfig, {}),
    "vit": (ViT, ViTConfig, {}),
}
_SEQUENCE_MODELS: dict[str, tuple[type[Classifier], type[EncoderConfig]]] = {
    "adatape_parity": (AdaTapeParity, AdaTapeParityConfig),
    "transformer": (Transformer, TransformerConfig),
    "universal_transformer": (UniversalTransformer, UniversalTransformerConfig),
}
_SEQUENCE_CLASSES = 2
# The authors of A-ViT give the gate of these sizes alone.
_AVIT_SIZES = ("tiny", "small")


def _entries() -> dict[str, _Entry]:
    """Return all models by name."""
    entries = {}
    for size, letters in _SIZE_NAMES.items():
        for kind, (model, config, choices) in _IMAGE_MODELS.items():
            if kind == "avit" and size not in _AVIT_SIZES:
                continue
            for patch in _PATCHES:
                name = f"{kind}_{size}_patch{patch}_224"
                entry = _Entry(model, config, letters, patch, choices)
                if kind == "adatape":
                    for bank in ("input", "learn"):
                        entries[f"{name}.{bank}"] = entry._replace(choices={"bank": bank})
                else:
                    entries[name] = entry
        for kind, (model, config_of_sequences) in _SEQUENCE_MODELS.items():
            entries[f"{kind}_{size}"] = _Entry(model, config_of_sequences, letters, None, {})
    return dict(sorted(entries.items()))


_MODELS = _entries()


class ImageModel(NamedTuple):
    """What a name of a model of images stands for."""

    model: type[Classifier]
    """The model's class."""
    config: type[ViTConfig]
    """Its configuration's class."""
    choices: dict[str, Any]
    """Fields of the configuration that the name decides."""
    variant: str | None
    """Size and patch size as `ViTConfig.of` takes them; None of a kind alone, such as "avit"."""


def image_model(name: object) -> ImageModel:
    """Return what a kind, such as "avit", or a whole name of a model of images stands for.

    Raises:
        ValueError: there is no such kind and no such model of images.

    Example:
        >>> from adatape_kernels.models.factory import image_model
        >>> image_model("u2t").choices, image_model("uvit_base_patch32_224").variant
        ({'distinct_layers': 2}, 'B/32')
    """
    if isinstance(name, str) and name in _IMAGE_MODELS:
        return ImageModel(*_IMAGE_MODELS[name], None)
    entry = _MODELS.get(name) or _MODELS.get(f"{name}.input") if isinstance(name, str) else None
    if entry is None or not issubclass(entry.config, ViTConfig):
        raise ValueError(
            f"model: expected {', '.join(_IMAGE_MODELS)}, or a model of images as list_models() "
            f"names it, got {shown(name)}"
        )
    return ImageModel(entry.model, entry.config, entry.choices, f"{entry.size}/{entry.patch}")


def list_models(filter: str = "") -> list[str]:
    """Return the names that `create_model` knows, in alphabetical order.

    Args:
        filter: a pattern as of file names, such as "*vit*_base*"; empty for all.

    Raises:
        TypeError: filter is no text.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.list_models("avit_*_patch16_224")
        ['avit_small_patch16_224', 'avit_tiny_patch16_224']
    """
    if not isinstance(filter, str):
        raise TypeError(f"filter: expected a text, got {shown(filter)}")
    return fnmatch.filter(_MODELS, filter) if filter else [*_MODELS]


def create_model(name: str, **options: Any) -> Classifier:
    """Build a model by the name that `list_models` lists, with new parameters.

    The names are KIND_SIZE_patchP_224 for images and KIND_SIZE for sequences, with a size of tiny,
    small, base or large; those of AdaTape end in the kind of its bank, ".input" unless it is
    given.

    Args:
        name: one of `list_models()`.
        options: fields of the model's configuration, which go before those that the name stands
            for. A model of images has 1,000 classes and a model of sequences 2 unless num_classes
            is given.

    Raises:
        ValueError: the name is unknown, or an option is unknown or out of range.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.create_model("adatape_small_patch16_224.learn", bank_size=100)
        >>> type(model).__name__, model.config.dim, model.config.bank
        ('AdaTapeViT', 384, 'learn')
    """
    entry = _MODELS.get(name) or _MODELS.get(f"{name}.input") if isinstance(name, str) else None
    if entry is None:
        raise ValueError(f"name: expected {_near(name)}, got {shown(name)}")
    make: Any = entry.model
    if entry.patch is not None:
        config_class: Any = entry.config
        return make(config_class.of(f"{entry.size}/{entry.patch}", **{**entry.choices, **options}))
    fields = {field.name for field in dataclasses.fields(entry.config)}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"options: expected a field of {entry.config.__name__}, got {option!r}"
            )
    sizes: dict[str, Any] = {**SIZES[entry.size], "num_classes": _SEQUENCE_CLASSES}
    return make(entry.config(**{**sizes, **options}))


def _near(name: object) -> str:
    """Return the names that a text comes near, in words, or how to see all."""
    near = difflib.get_close_matches(name, _MODELS, _NEAR) if isinstance(name, str) else []
    return " or ".join(near) if near else "one of list_models()"
