"""Taking over torch's layers: what of them ours can compute, and copies of their parameters."""

import functools
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adatape_kernels.layers.torch_modules import is_bare
from adatape_kernels.op_types import Activation

_GELU: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
"""Our names of the forms of GELU, by torch's argument `approximate`."""

_NUMBERED = re.compile(r"\b(layers|blocks)\.\d+\b")
_KINDS: dict[str, type[nn.Module]] = {
    "attention": nn.MultiheadAttention,
    "layer": nn.TransformerEncoderLayer,
    "encoder": nn.TransformerEncoder,
}
"""torch's classes that ours stand for, by the name of the argument that takes one."""


def activation_name(activation: Any) -> Activation | None:
    """Return our name of an activation as torch's layer holds it, or None where we have none."""
    if isinstance(activation, nn.Module):
        if not is_bare(activation):
            return None
        if type(activation) is nn.GELU:
            return _GELU.get(activation.approximate)
        return "relu" if type(activation) is nn.ReLU else None
    if isinstance(activation, functools.partial):
        only_approximate = not activation.args and activation.keywords.keys() == {"approximate"}
        if activation.func is F.gelu and only_approximate:
            return _GELU.get(activation.keywords["approximate"])
        return None
    if activation in (F.relu, torch.relu, "relu"):
        return "relu"
    return "gelu" if activation in (F.gelu, "gelu") else None


def differences_of_layer(layer: nn.TransformerEncoderLayer) -> list[str]:
    """Return in words all that torch's layer has and ours has not."""
    if type(layer) is not nn.TransformerEncoderLayer:
        return [f"the class {class_name(layer)}"]
    found = [] if is_bare(layer) else [not_bare("it")]
    for name, kinds in (
        ("linear1", (nn.Linear,)),
        ("linear2", (nn.Linear,)),
        ("norm1", (nn.LayerNorm,)),
        ("norm2", (nn.LayerNorm,)),
        ("dropout", (nn.Dropout, nn.Identity)),
        ("dropout1", (nn.Dropout, nn.Identity)),
        ("dropout2", (nn.Dropout, nn.Identity)),
    ):
        found += differences_of_part(name, getattr(layer, name), kinds)
    for name in ("dropout", "dropout1", "dropout2"):
        part = getattr(layer, name)
        if type(part) is nn.Dropout and part.p > 0 and part.training != layer.training:
            found.append(f"{name}.training = {part.training} in a layer of the other mode")
    if activation_name(layer.activation) is None:
        found.append(f"the activation {_activation_text(layer.activation)}")
    found += [f"self_attn: {each}" for each in differences_of_attention(layer.self_attn)]
    return found


def differences_of_attention(attention: nn.MultiheadAttention) -> list[str]:
    """Return in words all that torch's attention has and ours has not."""
    if type(attention) is not nn.MultiheadAttention:
        return [f"the class {class_name(attention)}"]
    found = [] if is_bare(attention) else [not_bare("it")]
    out_proj = attention.out_proj
    found += differences_of_part("out_proj", out_proj, (nn.Linear, NonDynamicallyQuantizableLinear))
    for name in ("kdim", "vdim"):
        if getattr(attention, name) != attention.embed_dim:
            found.append(f"{name} = {getattr(attention, name)}")
    if attention.bias_k is not None or attention.bias_v is not None:
        found.append("add_bias_kv = True")
    if attention.add_zero_attn:
        found.append("add_zero_attn = True")
    return found


def differences_of_encoder(encoder: nn.TransformerEncoder) -> list[str]:
    """Return in words all that torch's encoder has and ours has not."""
    if type(encoder) is not nn.TransformerEncoder:
        return [f"the class {class_name(encoder)}"]
    found = [] if is_bare(encoder) else [not_bare("it")]
    if len(encoder.layers) == 0:
        found.append("no layers")
    found += differences_of_part("norm", encoder.norm, (nn.LayerNorm, type(None)))
    for index, layer in enumerate(encoder.layers):
        found += [f"layers.{index}: {each}" for each in differences_of_layer(layer)]
    return found


def refuse_unknown(name: str, module: nn.Module, differences: list[str]) -> None:
    """Raise one ValueError that names all differences, if there are any."""
    if differences:
        raise ValueError(
            f"{name}: expected an nn.{_KINDS[name].__name__} with nothing that ours does not "
            f"compute, got {'; '.join(once(differences))}"
        )


def once(differences: Iterable[str]) -> list[str]:
    """Return what is said of several layers or blocks once, with a star for their numbers."""
    found: dict[str, list[str]] = {}
    for each in differences:
        found.setdefault(_NUMBERED.sub(r"\1.*", each), []).append(each)
    return [star if len(same) > 1 else same[0] for star, same in found.items()]


def dropout_rate(module: nn.Module) -> float:
    """Return the rate of torch's Dropout; an Identity in its place drops nothing."""
    return module.p if isinstance(module, nn.Dropout) else 0.0


def copy_parameters(theirs: nn.Module, ours: nn.Module) -> None:
    """Give our module copies of the parameters of theirs that have the same names.

    A copy has the dtype and device of the original, and requires a gradient if that does. What
    theirs has as None, such as a bias, is None here too; what theirs does not have stays.
    """
    for path, _ in list(ours.named_parameters()):
        parent, _, leaf = path.rpartition(".")
        if parent and not hasattr(theirs, parent.partition(".")[0]):
            continue
        value = getattr(theirs.get_submodule(parent), leaf)
        copy = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
        setattr(ours.get_submodule(parent), leaf, copy)


def differences_of_part(name: str, part: object, kinds: tuple[type, ...]) -> list[str]:
    """Return in words why a part is not one of some classes, or does more than its class."""
    if type(part) not in kinds:
        return [f"{name} of class {class_name(part)}"]
    return [not_bare(name)] if isinstance(part, nn.Module) and not is_bare(part) else []


def not_bare(name: str) -> str:
    """Return in words that calling a module runs more than the forward of its class."""
    return f"{name} with hooks, a forward of its own, or compiled by itself"


def class_name(module: object) -> str:
    """Return the full name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _activation_text(activation: Any) -> str:
    return repr(getattr(activation, "__qualname__", activation))
