"""Our models in timm's registry: `import adatape_kernels.timm`, then `timm.create_model`.

The names are KIND_SIZE_patchP_224 and, the same models for images of any size, KIND_SIZE_patchP,
where KIND is adatape_vit, avit, uvit or u2t, SIZE is tiny, small, base or large, of avit the first
two, and P is 16 or 32. They give a `TimmAdaTape` or another `TimmClassifier`. There are no
pretrained weights.

    model = timm.create_model("adatape_vit_small_patch16", num_classes=10, bank="input")

Source: SPEC 2, 6, 11 and 12; the sizes are those of Dosovitskiy et al. and Touvron et al.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from adatape_kernels.arguments import shown
from adatape_kernels.models.factory import ImageModel, image_model, list_models
from adatape_kernels.models.timm_protocol import PonderLoss, TimmAdaTape, TimmClassifier
from adatape_kernels.models.vit import AdaTapeViT

try:
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        resolve_pretrained_cfg,
    )
except ImportError as error:
    raise ImportError(
        "adatape_kernels.timm: expected timm, which it registers models with, got "
        f"{str(error)!r}; `pip install timm`"
    ) from None

__all__ = ["PonderLoss", "TimmAdaTape", "TimmClassifier"]  # timm adds the names of its entry points

_OPTIONS = {
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_path_rate": "stochastic_depth",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
    "global_pool": "pooling",
}
"""timm's names of options, and ours."""
_POOLINGS = {"token": "token", "avg": "mean", "max": "max", "sum": "sum"}


# The kinds that this package's `create_model` knows, and how their names begin here. timm has a ViT
# of its own.
_KINDS = {"adatape": "adatape_vit", "avit": "avit", "u2t": "u2t", "uvit": "uvit"}


def _variants() -> dict[str, ImageModel]:
    """Return what each name here stands for."""
    found = {}
    for kind, ours in _KINDS.items():
        for name in list_models(f"{kind}_*_patch*_224*"):
            whole = name.partition(".")[0]
            named = image_model(kind)._replace(variant=image_model(whole).variant)
            entered = f"{ours}{whole.removeprefix(kind)}"
            found[entered.removesuffix("_224")] = found[entered] = named
    return found


_VARIANTS = _variants()


def _prefix(named: ImageModel) -> str:
    """Return the name of the attribute that is the model itself."""
    return "adatape" if named.model is AdaTapeViT else "model"


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "classifier": f"{_prefix(named)}.head",
            "license": "apache-2.0",
        }
        for name, named in _VARIANTS.items()
    }
)


def _build(
    variant: str,
    *,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> TimmClassifier:
    """Return a model of timm's options and of fields of its configuration."""
    given = _our_options(options)
    named = _VARIANTS[variant]
    given["num_classes"] = num_classes or 1
    size, _, patch = str(named.variant).partition("/")
    if named.model is AdaTapeViT and given.get("pooling", "token") != "token":
        given.setdefault("query", "gap")
    fields: dict[str, Any] = {**named.choices, **given}
    config = named.config.of(f"{size}/{fields.pop('patch_size', patch)}", **fields)
    make: Any = named.model
    with torch.device(device or torch.get_default_device()):
        made = make(config).to(dtype=dtype)
    wrap: Any = TimmAdaTape if named.model is AdaTapeViT else TimmClassifier
    model: TimmClassifier = wrap(made, drop_rate=drop_rate)
    # Where images have another number of channels than those of a checkpoint, timm adapts these.
    convolutions = [
        f"{_prefix(named)}.{n}" for n in ("patch_embed", "bank_embed") if hasattr(made, n)
    ]
    own: Any = model
    own._traits = {"first_conv": convolutions if len(convolutions) > 1 else convolutions[0]}
    if num_classes == 0:
        model.reset_classifier(0)
    return model


def _our_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options by our names."""
    given = dict(options)
    for theirs, ours in _OPTIONS.items():
        if theirs not in options:
            continue
        value = given.pop(theirs)
        if ours in options:
            raise ValueError(f"{theirs}: expected none beside {ours}, got {shown(value)}")
        if theirs == "global_pool":
            if value not in _POOLINGS:
                raise ValueError(
                    f"global_pool: expected {', '.join(_POOLINGS)}, got {shown(value)}"
                )
            value = _POOLINGS[value]
        if theirs == "img_size" and isinstance(value, (tuple, list)):
            if len(set(value)) != 1:
                raise ValueError(f"img_size: expected a square, got {shown(value)}")
            value = value[0]
        given[ours] = value
    return given


def _create(variant: str, pretrained: bool = False, **options: Any) -> TimmClassifier:
    """Return what timm's entry point of a variant returns."""
    if options.pop("features_only", False):
        raise ValueError("features_only: expected False, as tokens form no map, got True")
    source = [options.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")]
    if pretrained and not resolve_pretrained_cfg(variant, *source).has_weights:
        raise ValueError(
            f"pretrained: expected False, as there are no weights of {variant}, got True"
        )
    build = functools.partial(_build, variant)
    model = build_model_with_cfg(build, variant, pretrained, **options)
    config = model.classifier.config
    size = (config.in_channels, config.image_size, config.image_size)
    model.pretrained_cfg["input_size"] = size  # what timm.data makes images for
    return model


def _entry_point(variant: str) -> Callable[..., TimmClassifier]:
    """Return the function that timm calls for a variant."""

    def create(pretrained: bool = False, **options: Any) -> TimmClassifier:
        return _create(variant, pretrained, **options)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"Return {variant}; options are those of timm and of our configuration."
    return create


for _variant in _VARIANTS:
    globals()[_variant] = register_model(_entry_point(_variant))
