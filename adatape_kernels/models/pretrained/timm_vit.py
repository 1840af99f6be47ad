"""The VisionTransformer of timm: what of it AdaTape computes, and its tensors."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adatape_kernels.data.preprocessing import Preprocessing
from adatape_kernels.layers.conversion import activation_name, class_name
from adatape_kernels.models.pretrained.source_vit import (
    ABSENT,
    NORMS,
    SourceViT,
    build,
    kind,
    missing_tokens,
    part_at,
    refuse_parts,
    several,
    state_dict_source,
    wrong_parts,
)
from adatape_kernels.models.vit import AdaTapeViT, AdaTapeViTOptions
from adatape_kernels.op_types import Activation

if TYPE_CHECKING:  # Python has Unpack from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Unpack

_POOLINGS = {"token": "token", "avg": "mean", "max": "max"}
_ACTIVATIONS: dict[str, Activation] = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}
_DROPOUT = ("torch.Dropout", *ABSENT)
# The classes that a part may have, by its name: the package of a class, and its own name.
_PARTS = {
    "patch_embed": ("timm.PatchEmbed",),
    "patch_embed.proj": ("torch.Conv2d",),
    "patch_embed.norm": ABSENT,
    "pos_drop": _DROPOUT,
    "patch_drop": ABSENT,
    "norm_pre": (*ABSENT, *NORMS),
    "blocks": ("torch.Sequential",),
    "norm": (*ABSENT, *NORMS),
    "fc_norm": (*ABSENT, *NORMS),
    "head_drop": _DROPOUT,
    "head": ("torch.Linear", *ABSENT),
}
_BLOCK_PARTS = {
    "norm1": NORMS,
    "attn": ("timm.Attention",),
    "attn.qkv": ("torch.Linear",),
    "attn.q_norm": ABSENT,
    "attn.k_norm": ABSENT,
    "attn.norm": ABSENT,
    "attn.attn_drop": _DROPOUT,
    "attn.proj": ("torch.Linear",),
    "attn.proj_drop": _DROPOUT,
    "ls1": ("timm.LayerScale", *ABSENT),
    "drop_path1": ("timm.DropPath", *ABSENT),
    "norm2": NORMS,
    "mlp": ("timm.Mlp",),
    "mlp.fc1": ("torch.Linear",),
    "mlp.drop1": _DROPOUT,
    "mlp.norm": ABSENT,
    "mlp.fc2": ("torch.Linear",),
    "mlp.drop2": _DROPOUT,
    "ls2": ("timm.LayerScale", *ABSENT),
    "drop_path2": ("timm.DropPath", *ABSENT),
}


def from_timm(
    model: nn.Module | Mapping[str, Tensor],
    *,
    new_head: bool = False,
    **options: "Unpack[AdaTapeViTOptions]",
) -> AdaTapeViT:
    """Make an AdaTape model of a VisionTransformer of timm, on copies of its parameters.

    While nothing is read (`num_tape_tokens=0`, `halt_threshold=0` or `read_layers=()`) its logits
    are the source's. Sizes, activation, epsilon of norms, pooling, register tokens, the place of
    norms, rates of dropout, preprocessing, dtype, device, mode and what requires a gradient come
    from the source; LayerScale is multiplied into the weights. A bias that the source does not have
    is zero and stays so. What the tape needs is new, initialised as in `adatape_vit`.

    Args:
        model: the VisionTransformer, or its state dict. A state dict does not tell num_heads, which
            is required then; activation is "gelu", norm_eps 1e-6, pooling that of the tensors
            and image_size that of square positions unless options say otherwise.
        new_head: whether the head is a new one, for num_classes classes, rather than the source's.
        options: fields of AdaTapeViTConfig, such as bank, what the tape is read from. What the
            source decides may not differ from it, save for the rates with which training drops
            something. tape_ffn_dim is dim where it is not given, and bank_patch_size half the
            patch size or the next smaller divisor of the image.

    Returns:
        The model, in the source's mode, or in the mode for evaluation for a state dict.

    Raises:
        TypeError: the model is neither a module nor a mapping.
        ValueError: the source has something that is not computed here, such as a norm of queries
            and keys, RMSNorm, SwiGLU, a second class token or pooling by attention, all of which
            is named; its tensors have other names or shapes; or an option is unknown or wrong.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> block = {"norm1": (6,), "norm2": (6,), "attn.qkv": (18, 6), "attn.proj": (6, 6),
        ...     "mlp.fc1": (8, 6), "mlp.fc2": (6, 8)}
        >>> shapes = {"norm": (6,), "head": (5, 6), "patch_embed.proj": (6, 3, 4, 4)}
        >>> shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
        >>> state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        >>> state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
        >>> state |= {"cls_token": torch.randn(1, 1, 6), "pos_embed": torch.randn(1, 5, 6)}
        >>> model = ak.models.from_timm(state, num_heads=2)
        >>> model.config.image_size, model(torch.randn(2, 3, 8, 8)).logits.shape
        (8, torch.Size([2, 5]))
    """
    if isinstance(model, nn.Module):
        refuse_parts("timm", _differences(model))
        facts = _facts(model)
        preprocessing = _preprocessing(model, facts["image_size"])
        source = SourceViT(_tensors(model), facts, preprocessing, model.training)
    elif isinstance(model, Mapping):
        if "conv_proj.weight" in model:
            raise ValueError(
                "model: expected names of timm, got torchvision's, which "
                "ak.models.from_torchvision takes"
            )
        source = state_dict_source(model)
    else:
        raise TypeError(
            "model: expected a VisionTransformer of timm or its state dict, "
            f"got {type(model).__name__}"
        )
    return build(source, new_head, options)


def _differences(model: Any) -> Iterator[str]:
    """Yield in words all that timm's model has and ours has not."""
    if kind(model) != "timm.VisionTransformer":
        yield f"the class {class_name(model)}"
        return
    if getattr(model, "attn_pool", None) is not None:
        yield f"attn_pool of class {class_name(model.attn_pool)}"
    elif model.global_pool not in _POOLINGS:
        yield f"global_pool = {model.global_pool!r}"
    kinds = dict(_PARTS)
    for index, block in enumerate(model.blocks.children()):
        kinds[f"blocks.{index}"] = ("timm.Block",)
        if kind(block) == "timm.Block":
            kinds |= {f"blocks.{index}.{name}": possible for name, possible in _BLOCK_PARTS.items()}
    wrong = list(wrong_parts(model, kinds))
    for index, block in enumerate(model.blocks.children()):
        act = part_at(block, "mlp.act")
        if act is not None and _activation(act) is None:
            wrong.append(f"blocks.{index}.mlp.act of class {class_name(act)}")
        if part_at(block, "attn.gate") is not None:
            wrong.append(f"blocks.{index}.attn.gate")
    yield from wrong
    if not wrong:  # what follows relies on the classes
        yield from _wrong_values(model)


def _wrong_values(model: Any) -> Iterator[str]:
    """Yield in words what differs in a model whose parts all have classes that are known."""
    proj, embed, blocks = model.patch_embed.proj, model.patch_embed, model.blocks
    if len(blocks) == 0:
        yield "no blocks"
        return
    square = len(set(proj.kernel_size)) == 1 and proj.kernel_size == proj.stride
    if not square or proj.padding != (0, 0) or proj.groups != 1 or proj.dilation != (1, 1):
        yield f"patch_embed.proj with patches other than squares side by side: {proj}"
    if embed.img_size is None or len(set(embed.img_size)) > 1:
        yield f"patch_embed.img_size = {embed.img_size}"
    if (kind(model.norm) == "torch.Identity") == (kind(model.fc_norm) == "torch.Identity"):
        yield "two norms behind the blocks, or none"
    if model.global_pool != "token" and _pools_prefix(model):
        yield "pool_include_prefix = True"
    if model.global_pool == "token" and model.cls_token is None:
        yield "pooling by a class token that it does not have"
    dim, heads = proj.out_channels, blocks[0].attn.num_heads
    for index, block in enumerate(blocks):
        attn = block.attn
        if attn.num_heads != heads or attn.head_dim * heads != dim:
            yield f"blocks.{index}.attn with {attn.num_heads} heads of {attn.head_dim}"
        elif abs(attn.scale * attn.head_dim**0.5 - 1) > 1e-6:
            yield f"blocks.{index}.attn.scale = {attn.scale}"
    yield from missing_tokens(model, ("cls_token", "reg_token", "pos_embed"))
    yield from several("epsilons of norms", (m.eps for _, m in _norms(model)))
    yield from several("activations", (_activation(block.mlp.act) for block in blocks))
    if _rate(model, "head_drop") > 0:
        yield f"head_drop of {model.head_drop.p}"
    rates = [_rate(model, "pos_drop")]
    for block in blocks:
        rates += [_rate(block, name) for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]
    yield from several("rates of dropout", rates)
    yield from several("rates of attn_drop", (_rate(block, "attn.attn_drop") for block in blocks))
    last = _drop_path(blocks[-1].drop_path2)
    for index, block in enumerate(blocks):
        expected = last * index / max(1, len(blocks) - 1)
        for part in (block.drop_path1, block.drop_path2):
            if abs(_drop_path(part) - expected) > 1e-6:
                yield f"blocks.{index} with a drop_path of {_drop_path(part)}"


def _facts(model: Any) -> dict[str, Any]:
    """Return the fields of a configuration that tensors do not tell."""
    first = model.blocks[0]
    return {
        "image_size": model.patch_embed.img_size[0],
        "num_heads": first.attn.num_heads,
        "activation": _activation(first.mlp.act),
        "norm_eps": first.norm1.eps,
        "pooling": _POOLINGS[model.global_pool],
        "dropout": _rate(model, "pos_drop"),
        "attention_dropout": _rate(first, "attn.attn_drop"),
        "stochastic_depth": _drop_path(model.blocks[-1].drop_path2),
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, with ones and zeros where a norm has no weight or bias."""
    tensors = dict(model.state_dict(keep_vars=True))
    like = next(iter(tensors.values())).detach()
    made = {}
    for name, norm in _norms(model):
        if norm.weight is None:
            made[f"{name}.weight"] = like.new_ones(norm.normalized_shape)
        if norm.bias is None:
            made[f"{name}.bias"] = like.new_zeros(norm.normalized_shape)
    return {**tensors, **made}


def _norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            yield name, module


def _preprocessing(model: Any, image_size: int) -> Preprocessing | None:
    """Return what timm says of the model's images, or None where it says nothing."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels = model.patch_embed.proj.in_channels
    entries = {"image_size": image_size, "channels": channels}
    try:
        return Preprocessing.from_entries({**entries, "mean": config["mean"], "std": config["std"]})
    except (KeyError, ValueError):
        return None


def _pools_prefix(model: Any) -> bool:
    return model.num_prefix_tokens > 0 and getattr(model, "pool_include_prefix", False)


def _rate(model: nn.Module, path: str) -> float:
    return getattr(part_at(model, path), "p", 0.0)


def _drop_path(part: Any) -> float:
    return getattr(part, "drop_prob", 0.0)


def _activation(part: object) -> Activation | None:
    package, _, name = kind(part).partition(".")
    return _ACTIVATIONS.get(name) if package == "timm" else activation_name(part)
