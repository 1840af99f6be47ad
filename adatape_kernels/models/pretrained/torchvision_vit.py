"""The VisionTransformer of torchvision: what of it AdaTape computes, and its tensors."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adatape_kernels.layers.conversion import (
    class_name,
    differences_of_attention,
)
from adatape_kernels.models.pretrained.source_vit import (
    ABSENT,
    SourceViT,
    build,
    kind,
    missing_tokens,
    refuse_parts,
    several,
    state_dict_source,
    wrong_parts,
)
from adatape_kernels.models.vit import AdaTapeViT, AdaTapeViTOptions

if TYPE_CHECKING:  # Python has Unpack from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Unpack

# timm's names of torchvision's parameters. Early files of torchvision have mlp.linear_1.
_NAMES = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(.*)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln\.(.*)", r"norm.\1"),
    (r"heads\.(?:head\.)?(weight|bias)", r"head.\1"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(weight|bias)",
        r"blocks.\1.attn.qkv.\2",
    ),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.*)",
        r"blocks.\1.attn.proj.\2",
    ),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
)

_DROPOUT = ("torch.Dropout", *ABSENT)
_MLP = ("torch.Linear", "torch.GELU", "torch.Dropout", "torch.Linear", "torch.Dropout")
_LAYER_PARTS: dict[str, tuple[str, ...]] = {
    "ln_1": ("torch.LayerNorm",),
    "self_attention": ("torch.MultiheadAttention",),
    "dropout": _DROPOUT,
    "ln_2": ("torch.LayerNorm",),
    "mlp": ("torchvision.MLPBlock",),
}


def from_torchvision(
    model: nn.Module | Mapping[str, Tensor],
    *,
    new_head: bool = False,
    **options: "Unpack[AdaTapeViTOptions]",
) -> AdaTapeViT:
    """Make an AdaTape model of a VisionTransformer of torchvision, on copies of its parameters.

    All is as in `from_timm`, save for the preprocessing, which torchvision's models do not carry.
    Errors name tensors as timm does.

    Args:
        model: the VisionTransformer, or its state dict, with which num_heads is required.
        new_head, options: as in `from_timm`.

    Raises:
        TypeError: the model is neither a module nor a mapping.
        ValueError: as in `from_timm`; a convolutional stem and a representation layer before the
            head are refused.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.from_torchvision({}, num_heads=2)
        Traceback (most recent call last):
        ...
        ValueError: model: expected the tensors of a ViT, patch_embed.proj.weight (dim, channels, \
patch, patch) and blocks.0.mlp.fc1.weight (ffn_dim, dim) among them, got none
    """
    if isinstance(model, nn.Module):
        refuse_parts("torchvision", _differences(model))
        tensors = _renamed(dict(model.state_dict(keep_vars=True)))
        source = SourceViT(tensors, _facts(model), training=model.training)
    elif isinstance(model, Mapping):
        source = state_dict_source(_renamed(model))
    else:
        raise TypeError(
            "model: expected a VisionTransformer of torchvision or its state dict, "
            f"got {type(model).__name__}"
        )
    return build(source, new_head, options)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by timm's names; a name that is none of torchvision's stays."""
    return {_timm_name(name): tensor for name, tensor in tensors.items()}


def _timm_name(name: str) -> str:
    for pattern, ours in _NAMES:
        found = re.fullmatch(pattern, str(name))
        if found:
            return found.expand(ours)
    return name


def _differences(model: Any) -> Iterator[str]:
    """Yield in words all that torchvision's model has and ours has not."""
    if kind(model) != "torchvision.VisionTransformer":
        yield f"the class {class_name(model)}"
        return
    kinds: dict[str, tuple[str, ...]] = {
        "conv_proj": ("torch.Conv2d",),
        "encoder": ("torchvision.Encoder",),
        "encoder.dropout": _DROPOUT,
        "encoder.layers": ("torch.Sequential",),
        "encoder.ln": ("torch.LayerNorm",),
        "heads": ("torch.Sequential", "torch.Linear", *ABSENT),
    }
    layers = list(model.encoder.layers.children())
    for index, layer in enumerate(layers):
        kinds[f"encoder.layers.{index}"] = ("torchvision.EncoderBlock",)
        if kind(layer) == "torchvision.EncoderBlock":
            kinds |= {f"encoder.layers.{index}.{name}": each for name, each in _LAYER_PARTS.items()}
            if kind(layer.mlp) == "torchvision.MLPBlock":
                kinds |= {f"encoder.layers.{index}.mlp.{i}": (e,) for i, e in enumerate(_MLP)}
    wrong = list(wrong_parts(model, kinds))
    parts = dict(model.heads.named_children())
    if kind(model.heads) == "torch.Sequential" and parts:
        if list(parts) != ["head"] or kind(parts["head"]) not in ("torch.Linear", *ABSENT):
            wrong.append(f"heads of {', '.join(parts)}")
    yield from wrong
    if wrong:  # what follows relies on the classes
        return
    if not layers:
        yield "no layers"
    for index, layer in enumerate(layers):
        if layer.mlp[1].approximate != "none":
            yield f"encoder.layers.{index}.mlp with another form of GELU"
        for each in differences_of_attention(layer.self_attention):
            yield f"encoder.layers.{index}.self_attention: {each}"
    norms = [model.encoder.ln, *(norm for layer in layers for norm in (layer.ln_1, layer.ln_2))]
    yield from missing_tokens(model, ("class_token", "encoder.pos_embedding"))
    yield from several("epsilons of norms", (norm.eps for norm in norms))
    yield from several("numbers of heads", (layer.self_attention.num_heads for layer in layers))
    rates = [_rate(model.encoder.dropout)]
    for layer in layers:
        rates += [_rate(part) for part in (layer.dropout, layer.mlp[2], layer.mlp[4])]
    yield from several("rates of dropout", rates)
    yield from several("rates of attention", (layer.self_attention.dropout for layer in layers))


def _facts(model: Any) -> dict[str, Any]:
    """Return the fields of a configuration that tensors do not tell."""
    attention = model.encoder.layers[0].self_attention
    return {
        "image_size": model.image_size,
        "num_heads": attention.num_heads,
        "activation": "gelu",
        "norm_eps": model.encoder.ln.eps,
        "pooling": "token",
        "dropout": _rate(model.encoder.dropout),
        "attention_dropout": attention.dropout,
        "stochastic_depth": 0.0,
    }


def _rate(dropout: Any) -> float:
    return getattr(dropout, "p", 0.0)
