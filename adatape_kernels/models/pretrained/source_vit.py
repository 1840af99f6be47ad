"""A ViT of another package as tensors and facts, and the AdaTape model that is made of it.

Each package has a file of its own that says what of its ViT cannot be computed here and gives the
rest the names that timm uses. This file reads the sizes off the tensors and copies them.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_flag, shown
from adatape_kernels.data.preprocessing import Preprocessing
from adatape_kernels.layers.conversion import class_name, not_bare, once
from adatape_kernels.layers.torch_modules import is_bare
from adatape_kernels.models.vit import AdaTapeViT, AdaTapeViTConfig

_PATCHES, _BLOCK = "patch_embed.proj.weight", re.compile(r"blocks\.(\d{1,6})\.")
_MOST_SHOWN = 6
# Rates that act in training alone, and the size of the head, may differ from the source's.
_TRAINING = ("dropout", "attention_dropout", "stochastic_depth")


@dataclass(frozen=True)
class SourceViT:
    """A ViT of another package."""

    tensors: Mapping[str, Tensor]
    """Parameters by timm's names; one that is to be trained requires a gradient."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of AdaTapeViTConfig that no tensor tells, as far as the source knows them."""
    preprocessing: Preprocessing | None = None
    """What makes the input of image files, where it is known."""
    training: bool = False
    """Whether the source is in the mode for training."""


def state_dict_source(argument: Mapping[str, Any]) -> SourceViT:
    """Return a state dict as a source that knows its tensors alone, all of them to be trained.

    Raises:
        ValueError: it has something that is no tensor of floating-point numbers.
    """
    for name, tensor in argument.items():
        if not isinstance(name, str):
            raise ValueError(f"model: expected tensors by name, got {shown(name)} for a name")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"model: expected floating-point tensors by name, got {shown(name)} of {kind}"
            )
    return SourceViT({name: t.detach().requires_grad_() for name, t in argument.items()})


ABSENT = ("torch.Identity",)
"""The kind of a part that does nothing, or is not there."""
NORMS = ("torch.LayerNorm", "timm.LayerNorm")
"""The kinds of LayerNorm."""


def kind(part: object) -> str:
    """Return the package that an object's class comes from and the class's own name."""
    return f"{type(part).__module__.partition('.')[0]}.{type(part).__qualname__}"


def part_at(model: nn.Module, path: str) -> Any:
    """Return a submodule, or None where there is none."""
    part: Any = model
    for name in path.split("."):
        part = part[int(name)] if name.isdigit() else getattr(part, name, None)
    return part


def wrong_parts(model: nn.Module, kinds: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield in words which parts of a ViT are of none of the kinds that they may be of.

    Args:
        model: the ViT.
        kinds: by a part's path, the kinds that it may be of, as `kind` names them.
    """
    for name, module in model.named_modules():
        if not is_bare(module):
            yield not_bare(name or "it")
    for path, possible in kinds.items():
        part = part_at(model, path)
        if kind(part) not in possible and not (part is None and "torch.Identity" in possible):
            yield f"{path} of class {class_name(part)}"


def several(what: str, values: Iterable[Any]) -> Iterator[str]:
    """Yield in words that values differ which are one in our model."""
    different = sorted(set(values))
    if len(different) > 1:
        yield f"several {what}: {', '.join(map(str, different))}"


def missing_tokens(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yield in words which tokens or positions a ViT has, but not as parameters or buffers."""
    held = model.state_dict(keep_vars=True)
    for name in names:
        if part_at(model, name) is not None and name not in held:
            yield f"{name} that is neither a parameter nor a buffer"


def refuse_parts(package: str, differences: Iterable[str]) -> None:
    """Raise one ValueError that names all that a ViT has and ours has not, if there is anything.

    What all blocks have is named once, with a star for the block.
    """
    found = once(differences)
    if found:
        raise ValueError(
            f"model: expected a ViT of {package} with nothing that ours does not compute, "
            f"got {'; '.join(found)}"
        )


def build(source: SourceViT, new_head: bool, options: Mapping[str, Any]) -> AdaTapeViT:
    """Return the AdaTape model that computes what the source does while nothing is read.

    Raises:
        ValueError: the tensors are not those of a ViT, or an option is unknown, missing, out of
            range or not as in the source.
    """
    check_flag("new_head", new_head)
    tensors = source.tensors
    known = {**source.facts, **_sizes(tensors)}
    _check_tensors(tensors, known)
    pooling = known.get("pooling", options.get("pooling"))
    if pooling is None:
        pooling = "token" if "cls_token" in tensors and "norm.weight" in tensors else "mean"
    elif pooling == "token" and "cls_token" not in tensors:
        raise ValueError("pooling: expected 'mean' or 'max' without a class token, got 'token'")
    prefix = sum(tensors[name].shape[1] for name in ("cls_token", "reg_token") if name in tensors)
    known["pooling"], known["num_registers"] = pooling, prefix - (pooling == "token")
    known["class_token"], known["representation_size"] = True, 0
    known.setdefault("image_size", options.get("image_size", None))
    if known["image_size"] is None:
        known["image_size"] = known["patch_size"] * _grid(tensors, prefix)
    config = _config(known, options, new_head)
    ours = _renamed(tensors, config, prefix)
    if config.num_classes == known.get("num_classes") and not new_head:
        ours["head.weight"] = tensors["head.weight"]
        ours["head.bias"] = _bias(tensors, "head")
    device, dtype = tensors[_PATCHES].device, tensors[_PATCHES].dtype
    with torch.device(device):
        model = AdaTapeViT(config).to(dtype)
    for name, tensor in ours.items():
        parent, _, leaf = name.rpartition(".")
        copy = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        setattr(model.get_submodule(parent), leaf, copy)
    model.preprocessing = source.preprocessing
    return model.train(source.training)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a configuration that a ViT's tensors tell."""
    patches, hidden = tensors.get(_PATCHES), tensors.get("blocks.0.mlp.fc1.weight")
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.match(name))}
    if patches is None or hidden is None or patches.dim() != 4 or hidden.dim() != 2:
        raise ValueError(
            f"model: expected the tensors of a ViT, {_PATCHES} (dim, channels, patch, patch) and "
            f"blocks.0.mlp.fc1.weight (ffn_dim, dim) among them, got {_shapes(tensors)}"
        )
    sizes = {
        "dim": patches.shape[0],
        "depth": len(blocks),
        "ffn_dim": hidden.shape[0],
        "in_channels": patches.shape[1],
        "patch_size": patches.shape[2],
        "pre_norm": "norm_pre.weight" in tensors,
        "norm_after_pooling": "fc_norm.weight" in tensors,
    }
    head = tensors.get("head.weight")
    return sizes if head is None else {**sizes, "num_classes": head.shape[0]}


def _check_tensors(tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> None:
    """Compare names and shapes with those of a ViT of these sizes. Raises ValueError."""
    dim, ffn_dim, patch = sizes["dim"], sizes["ffn_dim"], sizes["patch_size"]
    norms = ["fc_norm" if sizes["norm_after_pooling"] else "norm"]
    norms += ["norm_pre"] if sizes["pre_norm"] else []
    linears = {"head": (sizes["num_classes"], dim)} if "num_classes" in sizes else {}
    scales = []
    for block in (f"blocks.{index}." for index in range(sizes["depth"])):
        norms += [f"{block}norm1", f"{block}norm2"]
        scales += [f"{block}ls1.gamma", f"{block}ls2.gamma"]
        linears[f"{block}attn.qkv"], linears[f"{block}attn.proj"] = (3 * dim, dim), (dim, dim)
        linears[f"{block}mlp.fc1"], linears[f"{block}mlp.fc2"] = (ffn_dim, dim), (dim, ffn_dim)
    required: dict[str, tuple[int, ...]] = {
        _PATCHES: (dim, sizes["in_channels"], patch, patch),
        **{f"{name}.{leaf}": (dim,) for name in norms for leaf in ("weight", "bias")},
        **{f"{name}.weight": shape for name, shape in linears.items()},
    }
    optional: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.bias": (dim,),
        **{f"{name}.bias": shape[:1] for name, shape in linears.items()},
        **dict.fromkeys(scales, (dim,)),
        "cls_token": (1, 1, dim),
    }
    for name in ("pos_embed", "reg_token"):
        tokens = tensors[name].shape[1:2] if name in tensors else (1,)
        optional[name] = (1, *(tokens or (1,)), dim)
    if "num_heads" not in sizes:  # a state dict: what one block lacks and others have is lost
        held = {_in_block(name) for name in tensors if _BLOCK.match(name)}
        required |= {name: shape for name, shape in optional.items() if _in_block(name) in held}
    differ = []
    for name in [*required, *(name for name in tensors if name not in required)]:
        expected = required.get(name, optional.get(name))
        came = tuple(tensors[name].shape) if name in tensors else None
        if came != expected:
            differ.append(f"{name} {expected or 'none'} / {'none' if came is None else came}")
    wrong = once(differ)
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise ValueError(
            "model: expected the tensors of a ViT with nothing that ours does not compute, got "
            f"others (name, the expected shape / its own): {'; '.join(wrong[:_MOST_SHOWN])}"
            f"{more}"
        )
    for what in ("dtype", "device"):
        found = sorted({str(getattr(tensor, what)) for tensor in tensors.values()})
        if len(found) > 1:
            raise ValueError(f"model: expected tensors of one {what}, got {', '.join(found)}")


def _in_block(name: str) -> str:
    """Return a tensor's name with a star for the number of its block."""
    return _BLOCK.sub("blocks.*.", name)


def _grid(tensors: Mapping[str, Tensor], prefix: int) -> int:
    """Return how many patches an image has along a side, by the number of positions."""
    if "pos_embed" not in tensors:
        raise ValueError("image_size: expected a number, as the source has no positions, got none")
    count = tensors["pos_embed"].shape[1]
    for patches in (count - prefix, count):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    raise ValueError(
        f"pos_embed: expected a square number of positions, or {prefix} more, got {count}"
    )


def _config(known: Mapping[str, Any], given: Mapping[str, Any], new_head: bool) -> AdaTapeViTConfig:
    """Return the configuration of what is known of the source, and of the options."""
    fields = {each.name for each in dataclasses.fields(AdaTapeViTConfig)}
    for name, value in given.items():
        if name not in fields:
            raise ValueError(f"options: expected a field of AdaTapeViTConfig, got {name!r}")
        free = name in _TRAINING or (name == "num_classes" and new_head)
        if name in known and not free and not _equal(value, known[name]):
            hint = "; new_head=True makes a new head" if name == "num_classes" else ""
            raise ValueError(
                f"{name}: expected {known[name]!r}, as in the source, got {shown(value)}{hint}"
            )
    for name, reason in (
        ("num_heads", "as a state dict does not tell it"),
        ("num_classes", "as the source has no head"),
    ):
        if name not in known and name not in given:
            raise ValueError(f"{name}: expected a number, {reason}, got none")
    image, patch = known["image_size"], known["patch_size"]
    defaults = {
        "tape_ffn_dim": known["dim"],
        "query": "token" if known["pooling"] == "token" else "gap",
        "activation": "gelu",
    }
    if isinstance(image, Integral):
        smaller = range(max(1, patch // 2), 0, -1)
        defaults["bank_patch_size"] = next(size for size in smaller if image % size == 0)
    return AdaTapeViTConfig(**{**defaults, **known, **given})


def _equal(value: object, known: object) -> bool:
    """Return whether an option is what the source has; 1 is not True."""
    if value is known:
        return True
    try:
        return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)
    except (RuntimeError, TypeError, ValueError):  # a tensor or an array of several numbers
        return False


def _renamed(
    tensors: Mapping[str, Tensor], config: AdaTapeViTConfig, prefix: int
) -> dict[str, Tensor]:
    """Return the parameters by our names, LayerScale multiplied into them.

    A result requires a gradient if one of the tensors that it is made of does. What the source does
    not have, such as a bias, is zero and requires none.
    """
    with torch.enable_grad():
        ours = {
            "patch_embed.weight": tensors[_PATCHES],
            "patch_embed.bias": _bias(tensors, "patch_embed.proj"),
            "position": _position(tensors, config, prefix),
        }
        first = [tensors[name] for name in ("cls_token", "reg_token") if name in tensors]
        if config.pooling == "token":
            ours["class_token"] = first.pop(0)
        if config.num_registers:
            ours["registers"] = torch.cat(first, 1)
        norms = {"norm_pre": "pre_norm", "norm": "encoder.norm", "fc_norm": "head.norm"}
        for index in range(config.depth):
            theirs, layer = f"blocks.{index}.", f"encoder.layers.{index}."
            for number in (1, 2):
                norms[f"{theirs}norm{number}"] = f"{layer}norm{number}"
            ours[f"{layer}self_attn.in_proj_weight"] = tensors[f"{theirs}attn.qkv.weight"]
            ours[f"{layer}self_attn.in_proj_bias"] = _bias(tensors, f"{theirs}attn.qkv")
            for linear, name, scale in (
                ("attn.proj", "self_attn.out_proj", "ls1"),
                ("mlp.fc1", "linear1", None),
                ("mlp.fc2", "linear2", "ls2"),
            ):
                gamma = None if scale is None else tensors.get(f"{theirs}{scale}.gamma")
                ours[f"{layer}{name}.weight"] = _scaled(tensors[f"{theirs}{linear}.weight"], gamma)
                ours[f"{layer}{name}.bias"] = _scaled(_bias(tensors, f"{theirs}{linear}"), gamma)
        for theirs, name in norms.items():
            if f"{theirs}.weight" in tensors:
                ours[f"{name}.weight"] = tensors[f"{theirs}.weight"]
                ours[f"{name}.bias"] = tensors[f"{theirs}.bias"]
    return ours


def _bias(tensors: Mapping[str, Tensor], linear: str) -> Tensor:
    """Return the bias of a linear module or convolution, or zeros where it has none."""
    bias = tensors.get(f"{linear}.bias")
    weight = tensors[f"{linear}.weight"]
    return weight.detach().new_zeros(weight.shape[0]) if bias is None else bias


def _scaled(tensor: Tensor, gamma: Tensor | None) -> Tensor:
    """Return a weight (out, in) or a bias (out,) times gamma (out,), rounded once."""
    if gamma is None:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    scale = gamma.to(wide) if tensor.dim() == 1 else gamma.to(wide).unsqueeze(1)
    product = (tensor.to(wide) * scale).to(tensor.dtype)
    # A bias that the source lacks stays without a gradient.
    return product if tensor.requires_grad else product.detach()


def _position(tensors: Mapping[str, Tensor], config: AdaTapeViTConfig, prefix: int) -> Tensor:
    """Return the positions of all tokens, (1, prefix + patches, dim); zero where there are none."""
    weight, patches = tensors[_PATCHES].detach(), config.num_patches
    if "pos_embed" not in tensors:
        return weight.new_zeros(1, prefix + patches, config.dim)
    position = tensors["pos_embed"]
    if position.shape[1] == prefix + patches:
        return position
    if position.shape[1] == patches:
        return torch.cat([weight.new_zeros(1, prefix, config.dim), position], 1)
    raise ValueError(
        f"pos_embed: expected {patches} or {prefix + patches} positions for image_size "
        f"{config.image_size}, got {position.shape[1]}"
    )


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    """Return the first names and shapes in words."""
    first = [f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:_MOST_SHOWN]]
    more = f" and {len(tensors) - _MOST_SHOWN} more" if len(tensors) > _MOST_SHOWN else ""
    return f"{'; '.join(first)}{more}" if first else "none"
