"""The VisionTransformer of torchvision: what of it AdaTape computes, and its tensors."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adatape_kernels.layers.conversion import (
    class_name,
    differences_of_attention,
    differences_of_part,
    not_bare,
)
from adatape_kernels.layers.torch_modules import is_bare
from adatape_kernels.models.pretrained.source_vit import (
    SourceViT,
    build,
    refuse_parts,
    state_dict_source,
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
    (r"heads\.head\.(.*)", r"head.\1"),
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
        tensors = _renamed(dict(model.named_parameters()))
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
    if class_name(model) != "torchvision.models.vision_transformer.VisionTransformer":
        yield f"the class {class_name(model)}"
        return
    for name, module in model.named_modules():
        if not is_bare(module):
            yield not_bare(name or "it")
    yield from differences_of_part("conv_proj", model.conv_proj, (nn.Conv2d,))
    yield from differences_of_part("encoder.ln", model.encoder.ln, (nn.LayerNorm,))
    if list(dict(model.heads.named_children())) != ["head"]:
        yield f"heads of {', '.join(dict(model.heads.named_children()))}"
    yield from differences_of_part("heads.head", model.heads[-1], (nn.Linear,))
    norms = [model.encoder.ln]
    for index, layer in enumerate(model.encoder.layers):
        block = f"blocks.{index}"
        for name, kind in (
            ("ln_1", nn.LayerNorm),
            ("ln_2", nn.LayerNorm),
            ("dropout", nn.Dropout),
        ):
            yield from differences_of_part(f"{block}.{name}", getattr(layer, name), (kind,))
        norms += [layer.ln_1, layer.ln_2]
        kinds = (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)
        if [type(part) for part in layer.mlp] != list(kinds):
            yield f"{block}.mlp of {', '.join(class_name(part) for part in layer.mlp)}"
        elif layer.mlp[1].approximate != "none":
            yield f"{block}.mlp with another form of GELU"
        for each in differences_of_attention(layer.self_attention):
            yield f"{block}.self_attention: {each}"
    if len({getattr(norm, "eps", None) for norm in norms}) > 1:
        yield "several epsilons of norms"


def _facts(model: Any) -> dict[str, Any]:
    """Return the fields of a configuration that tensors do not tell."""
    first = model.encoder.layers[0]
    return {
        "image_size": model.image_size,
        "num_heads": first.num_heads,
        "activation": "gelu",
        "norm_eps": model.encoder.ln.eps,
        "pooling": "token",
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "stochastic_depth": 0.0,
    }
