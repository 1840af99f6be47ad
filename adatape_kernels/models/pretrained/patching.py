"""Our attention and MLP in a ViT of timm that somebody already has, and timm's own back again."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from adatape_kernels.layers.conversion import class_name, once
from adatape_kernels.models.pretrained.patched_block import (
    PatchedAttention,
    PatchedBlock,
    PatchedMlp,
    PatchedModule,
    own_class,
    patched_class,
)
from adatape_kernels.models.pretrained.patched_vit import PatchedNaFlexViT, PatchedViT
from adatape_kernels.models.pretrained.source_vit import ABSENT, kind, part_at

Model = TypeVar("Model", bound=nn.Module)

_MODELS: dict[str, type[PatchedModule]] = {
    "timm.models.vision_transformer.VisionTransformer": PatchedViT,
    "timm.models.naflexvit.NaFlexVit": PatchedNaFlexViT,
}
_BLOCK = "timm.models.vision_transformer.Block"
_ATTENTION = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
_MLP = "timm.layers.mlp.Mlp"
# Norms of a row's features, which therefore do not mind how rows are arranged.
_NORMS = (
    *("torch.LayerNorm", "timm.LayerNorm", "timm.LayerNormFp32"),
    *("torch.RMSNorm", "timm.RmsNorm", "timm.RmsNormFp32"),
    *("timm.SimpleNorm", "timm.SimpleNormFp32"),
)
_DROPOUT = ("torch.Dropout", *ABSENT)
_BLOCK_PARTS = {
    "norm1": _NORMS,
    "ls1": ("timm.LayerScale", *ABSENT),
    "drop_path1": ("timm.DropPath", *ABSENT),
    "norm2": _NORMS,
    "ls2": ("timm.LayerScale", *ABSENT),
    "drop_path2": ("timm.DropPath", *ABSENT),
    "attn.q_norm": (*_NORMS, *ABSENT),
    "attn.k_norm": (*_NORMS, *ABSENT),
    "attn.norm": (*_NORMS, *ABSENT),
    "attn.attn_drop": _DROPOUT,
    "attn.proj_drop": _DROPOUT,
}
_MLP_PARTS = {"mlp.drop1": _DROPOUT, "mlp.norm": (*_NORMS, *ABSENT), "mlp.drop2": _DROPOUT}
# Other MLPs stay timm's: they take rows of any number.
_OTHER_MLPS = ("timm.SwiGLU", "timm.SwiGLUPacked", "timm.GluMlp")
_ELEMENTWISE = {
    *("GELU", "GELUTanh", "QuickGELU", "ReLU", "ReLU6", "SiLU", "Swish", "Mish", "LeakyReLU"),
    *("ELU", "CELU", "SELU", "Softplus", "Sigmoid", "Tanh", "Identity"),
    *("Hardswish", "HardSwish", "Hardsigmoid", "HardSigmoid", "HardMish"),
}


def patch(model: Model) -> Model:
    """Let a ViT of timm compute attention and MLP by our ops, in place.

    Parameters, submodules, hooks, attributes and names in the state dict stay as they are, so that
    optimizers and checkpoints go on working; `type(model)` and the types of its blocks, attentions
    and MLPs are others, which extend the former ones. For tensors all results are as before, and
    what ours does not do (a mask, dropout of attention weights, modules with hooks or adapters) is
    done by timm's own code or by calling the module.

    The patched model also takes ragged batches. Its blocks take and return an `ElasticBatch`, and
    the model takes one whose rows are embedded tokens, the class token and registers first; or a
    list of images (channels, height, width), of several sizes if it was made with
    dynamic_img_size=True or is a NaFlexVit. `forward_features` then returns an `ElasticBatch`. Each
    example's results are what it gets alone. A NaFlexVit that is given patches with `patch_valid`
    computes the valid ones alone in its blocks.

    Args:
        model: a VisionTransformer of timm or of a class of your own that extends it, a NaFlexVit,
            or one Block of these.

    Returns:
        The same object.

    Raises:
        ValueError: it is something else, is patched already, or has parts that could not be told
            to give the same results, such as other attention or blocks, all of which is named.
            Nothing is changed then.
        TypeError: it is no module.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> ak.patch(torch.nn.Linear(2, 2))  # ak.patch(timm.create_model("vit_tiny_patch16_224"))
        Traceback (most recent call last):
        ...
        ValueError: model: expected a VisionTransformer, NaFlexVit or Block of timm with nothing \
that ours does not compute, got the class torch.nn.modules.linear.Linear
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    patched = [name for name, each in model.named_modules() if isinstance(each, PatchedModule)]
    if patched:
        what = "one that is" if patched[0] == "" else f"{patched[0]} that is"
        raise ValueError(
            f"model: expected one that is not patched, got {what}; ak.unpatch gives it back"
        )
    classes: dict[nn.Module, type[PatchedModule]] = {}
    wrong = once(_differences(model, classes))
    if wrong:
        raise ValueError(
            "model: expected a VisionTransformer, NaFlexVit or Block of timm with nothing that "
            f"ours does not compute, got {'; '.join(wrong)}"
        )
    module: Any
    for module, first in classes.items():
        module.__class__ = patched_class(first, type(module))
    return model


def unpatch(model: Model) -> Model:
    """Give a patched model, or a patched block, its own classes back, in place.

    Whatever else changed since `patch`, such as parameters, hooks and adapters, stays.

    Args:
        model: what `patch` returned, or a module that holds patched ones.

    Returns:
        The same object.

    Raises:
        ValueError: nothing in it is patched, or something else has changed the class of a patched
            module since, as sharding does. Nothing is changed then.
        TypeError: it is no module.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> ak.unpatch(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        ValueError: model: expected one that ak.patch has patched, got \
torch.nn.modules.linear.Linear
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    patched = {n: each for n, each in model.named_modules() if isinstance(each, PatchedModule)}
    if not patched:
        raise ValueError(f"model: expected one that ak.patch has patched, got {class_name(model)}")
    changed = [
        f"{n or 'it'} of class {class_name(m)}" for n, m in patched.items() if not own_class(m)
    ]
    if changed:
        raise ValueError(
            "model: expected classes as ak.patch has made them, got "
            f"{'; '.join(once(changed))}, which something else has made"
        )
    module: Any
    for module in patched.values():
        module.__class__ = own_class(module)
    return model


def _differences(model: nn.Module, classes: dict[nn.Module, type[PatchedModule]]) -> Iterator[str]:
    """Yield in words what cannot be patched; enter what each module is to become."""
    if class_name(model) == _BLOCK:
        yield from _block_differences("", model, classes)
        return
    names = [f"{each.__module__}.{each.__qualname__}" for each in type(model).__mro__]
    first = next((_MODELS[name] for name in names if name in _MODELS), None)
    if first is None:
        yield f"the class {class_name(model)}"
        return
    classes[model] = first
    blocks = dict(getattr(model, "blocks", nn.Sequential()).named_children())
    if not blocks:
        yield "no blocks"
    for name, block in blocks.items():
        if kind(block) not in ABSENT:
            yield from _block_differences(f"blocks.{name}.", block, classes)


def _block_differences(
    prefix: str, block: nn.Module, classes: dict[nn.Module, type[PatchedModule]]
) -> Iterator[str]:
    mlp = part_at(block, "mlp")
    possible = {"": (_BLOCK,), "attn": _ATTENTION}
    if kind(mlp) not in _OTHER_MLPS:
        possible["mlp"] = (_MLP,)
    for path, names in possible.items():
        part = part_at(block, path) if path else block
        where = f"{prefix}{path}".rstrip(".") or "it"
        if class_name(part) not in names:
            yield f"{where} of class {class_name(part)}"
            if not path:  # the names of its parts are unknown
                return
        elif "forward" in part.__dict__:
            yield f"{where} with a forward of its own"
        else:
            classes[part] = {"": PatchedBlock, "attn": PatchedAttention, "mlp": PatchedMlp}[path]
    for path, kinds in (_BLOCK_PARTS | (_MLP_PARTS if "mlp" in possible else {})).items():
        part = part_at(block, path)
        if part is not None and kind(part) not in kinds:
            yield f"{prefix}{path} of class {class_name(part)}"
    if class_name(mlp) == _MLP:
        act = part_at(mlp, "act")
        if kind(act) not in {
            f"{package}.{name}" for package in ("torch", "timm") for name in _ELEMENTWISE
        }:
            yield f"{prefix}mlp.act of class {class_name(act)}"
        for name in ("fc1", "fc2"):
            if isinstance(part_at(mlp, name), nn.Conv2d):
                yield f"{prefix}mlp.{name} of class {class_name(part_at(mlp, name))}"
