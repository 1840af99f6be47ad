"""Parameters of the public JAX code (google-research/scenic, projects/adatape) in our models.

Scenic's tree of parameters is given flattened, with names such as `params/a/b/c`, and its
configuration as JSON (SPEC 10), which `model_config` translates. `parameter_map` states for each of
scenic's parameters which of our parameters it fills and how its axes are rearranged.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.npz_file import NpzFile, UnreadableFile
from adatape_kernels.data.printable import printable
from adatape_kernels.models import (
    AdaTape,
    AdaTapeConfig,
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
)
from adatape_kernels.models.scenic_config import model_config

_MOST_CONFIG_BYTES = 1 << 20
_SHOWN = 300


class Target(NamedTuple):
    """The parameter of ours, or the third of it, that one of scenic's parameters fills."""

    key: str
    """Name of our parameter in the model's state dict."""
    convert: Callable[[np.ndarray], np.ndarray]
    """Rearranges scenic's array, or its gradient, to the shape of ours."""
    third: int | None = None
    """Which third of our parameter's rows is filled, 0, 1 or 2; None where all rows are."""

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what scenic's parameter fills: a view into the one of our tensors, by name."""
        tensor = tensors[self.key]
        return tensor if self.third is None else tensor.chunk(3)[self.third]

    def shape(self, theirs: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape that one of scenic's arrays has here, or None where it fits nothing."""
        try:
            # A single number seen as an array of any shape takes no memory.
            return self.convert(np.broadcast_to(np.float32(0), theirs)).shape
        except (ValueError, IndexError, TypeError):
            return None


def load(params: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdaTape:
    """Build a model from scenic's flattened parameters and configuration.

    Args:
        params: float32 arrays by name, `a/b/c` or `params/a/b/c`.
        config: entries by the names of SPEC 10.

    Returns:
        An AdaTapeViT or AdaTapeParity in float32 on torch's default device. Its images are
        (batch, channels, height, width), whereas scenic has the channels last.

    Raises:
        ValueError: an entry of the configuration, or a parameter, is missing, left over or of
            another shape than the configuration says.

    Source: SPEC 10; scenic adatape/layers.py.

    The example reads a file of the repository, from the folder of a clone.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> path = "tests/golden/vit_input_token.npz"
        >>> arrays = ak.scenic.read_npz(path)
        >>> config = ak.scenic.read_config(arrays, path)
        >>> params = {name: a for name, a in arrays.items() if name.startswith("params/")}
        >>> model = ak.scenic.load(params, config)
        >>> images = torch.tensor(arrays["inputs"]).permute(0, 3, 1, 2)
        >>> bool(((model(images).logits - torch.tensor(arrays["logits"])).abs() < 1e-4).all())
        True
    """
    check_kind("params", params, Mapping)
    check_kind("config", config, Mapping)
    ours_config = model_config(config)
    targets = check_params(params, ours_config)
    model = _build(ours_config)
    state = model.state_dict()
    for name, target in targets.items():
        array = np.asarray(params[name], dtype=np.float32)
        target.of(state).copy_(torch.from_numpy(target.convert(array)))
    return model


def check_params(
    params: Mapping[str, np.ndarray], config: AdaTapeViTConfig | AdaTapeParityConfig
) -> dict[str, Target]:
    """Compare names, shapes and dtypes of scenic's parameters with a configuration.

    The names are compared before anything is built, and the shapes with a model without memory; of
    a file the headers are read only.

    Args:
        params: arrays by name, `a/b/c` or `params/a/b/c`.
        config: as `model_config` returns it.

    Returns:
        What each parameter fills, by its name in `params`.

    Raises:
        ValueError: a parameter is missing, left over, of another shape than the configuration
            says, or not of floating point.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.adatape_vit("Ti/4", image_size=8, depth=1).config
        >>> ak.scenic.check_params({}, config)
        Traceback (most recent call last):
        ValueError: params: expected one named 'output_projection/kernel' for this config, got none
    """
    stored = {name.removeprefix("params/"): name for name in params}
    targets: dict[str, Target] = {}
    # What is missing first ends this: a configuration may ask for any number of layers.
    for name, target in _targets(config):
        if name not in stored:
            raise ValueError(f"params: expected one named {name!r} for this config, got none")
        targets[stored.pop(name)] = target
    if len(targets) < len(params):
        name = min(params.keys() - targets.keys())
        shown = printable(repr(name.removeprefix("params/")), _SHOWN)
        raise ValueError(f"params: expected none named {shown} for this config, got one")
    with torch.device("meta"):
        state = _build(config).state_dict()
    for name, target in targets.items():
        array = params.header(name) if isinstance(params, NpzFile) else params[name]
        ours = target.of(state)
        if tuple(ours.shape) != target.shape(array.shape):
            raise ValueError(
                f"params: expected {name.removeprefix('params/')} to fill {target.key} "
                f"{tuple(ours.shape)}, got {printable(array.shape, _SHOWN)}"
            )
        if array.dtype.kind != "f":
            raise ValueError(f"params: expected {name} of floating point, got {array.dtype}")
    return targets


def _build(config: AdaTapeViTConfig | AdaTapeParityConfig) -> AdaTape:
    return AdaTapeViT(config) if isinstance(config, AdaTapeViTConfig) else AdaTapeParity(config)


def load_file(path: str | Path) -> AdaTape:
    """Build a model from an .npz file that holds `config` and `params/…`, as in SPEC 10.

    Raises:
        ValueError: the file cannot be read, or as in `load`.

    The example reads a file of the repository, from the folder of a clone.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.scenic.load_file("tests/golden/vit_input_token.npz").config.num_tape_tokens
        8
    """
    with NpzFile(path) as arrays:
        config = read_config(arrays, path)
        try:
            return load(arrays.below("params/"), config)
        except UnreadableFile:
            raise
        except ValueError as error:
            raise ValueError(f"{printable(path)}: {error}") from None


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read every array of an .npz file, and unpickle nothing.

    Raises:
        ValueError: the file is missing, cut, no .npz file, holds anything but numbers and texts, or
            more than 256 MiB and 16 times its size.

    Example:
        >>> import adatape_kernels as ak
        >>> try:
        ...     ak.scenic.read_npz("absent.npz")
        ... except ValueError as error:
        ...     print(error)
        absent.npz: expected a readable .npz file, got: no such file
    """
    with NpzFile(path) as file:
        return dict(file)


def read_config(arrays: Mapping[str, np.ndarray], path: str | Path) -> dict[str, Any]:
    """Parse the entry `config`, which is a JSON object.

    Args:
        arrays: the content of an .npz file.
        path: the file's name in errors.

    Raises:
        ValueError: there is no such entry, or it is no JSON object.

    Example:
        >>> import numpy, adatape_kernels as ak
        >>> ak.scenic.read_config({"config": numpy.array('{"num_classes": 10}')}, "model.npz")
        {'num_classes': 10}
    """
    config = None
    if "config" in arrays:
        stored = arrays.header("config") if isinstance(arrays, NpzFile) else arrays["config"]
        if stored.dtype.kind == "U" and stored.shape == () and stored.nbytes <= _MOST_CONFIG_BYTES:
            # Python raises RecursionError over lists in lists in lists.
            with contextlib.suppress(ValueError, RecursionError):
                config = json.loads(str(arrays["config"]))
    if not isinstance(config, dict):
        raise UnreadableFile(
            f"{printable(path)}: expected an entry 'config' with a JSON object, got none"
        )
    return config


def parameter_map(model: AdaTape) -> dict[str, Target]:
    """Return what each of scenic's parameters fills in a model, by its name without `params/`.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
        >>> ak.scenic.parameter_map(model)["output_projection/kernel"].key
        'head.weight'
    """
    return dict(_targets(model.config))


def _targets(config: AdaTapeConfig) -> Iterator[tuple[str, Target]]:
    """Yield what each of scenic's parameters fills, layer after layer."""
    learned = config.bank == "learn"
    targets = {
        **_dense("output_projection", "head"),
        **_norm("Transformer/encoder_norm", "encoder.norm"),
    }
    if config.pooling == "token":
        targets["cls"] = Target("class_token", _same)
    if isinstance(config, AdaTapeViTConfig):
        targets |= _convolution("embedding", "patch_embed")
        targets["posembed_input/pos_embedding"] = Target("position", _same)
        if not learned:
            targets |= _convolution("embedding_bank", "bank_embed")
            targets["posembed_input_bank/pos_embedding"] = Target("bank_position", _same)
    else:
        targets |= _dense("embedding", "sequence_embed")
    if not learned:
        targets |= _dense("pre_bank", "pre_bank")
    yield from targets.items()
    for read, layer in enumerate(sorted(config.read_layers)):
        theirs, ours = f"Transformer/AddTapeToken_{read}", f"encoder.readers.{layer}"
        targets = _norm(f"{theirs}/TapeBank_0/bank_norm", f"{ours}.bank_norm")
        if learned:
            targets[f"{theirs}/TapeBank_0/tape_tokens"] = Target(f"{ours}.tape_tokens", _same)
        if config.tape_mlp_dim:
            targets |= _dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.tape_mlp.0")
            targets |= _dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.tape_mlp.2")
        yield from targets.items()
    first_read = min(config.read_layers, default=config.depth)
    for layer in range(config.depth):
        theirs, ours = f"Transformer/encoderblock_{layer}", f"encoder.layers.{layer}"
        targets = _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        targets |= _norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
        targets |= _attention(
            f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}.self_attn", config.num_heads
        )
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.linear1")
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.linear2")
        if config.tape_ffn_dim and layer >= first_read:
            targets |= _dense(f"{theirs}/tape_mlp/Dense_0", f"{ours}.tape_linear1")
            targets |= _dense(f"{theirs}/tape_mlp/Dense_1", f"{ours}.tape_linear2")
        yield from targets.items()


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _dense(theirs: str, ours: str) -> dict[str, Target]:
    """Map a dense layer, whose kernel is (in, out)."""
    return {
        f"{theirs}/kernel": Target(f"{ours}.weight", np.transpose),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _convolution(theirs: str, ours: str) -> dict[str, Target]:
    """Map a convolution, whose kernel is (height, width, in, out)."""
    return {
        f"{theirs}/kernel": Target(f"{ours}.weight", lambda k: k.transpose(3, 2, 0, 1)),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _norm(theirs: str, ours: str) -> dict[str, Target]:
    """Map a LayerNorm."""
    return {
        f"{theirs}/scale": Target(f"{ours}.weight", _same),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _attention(theirs: str, ours: str, num_heads: int) -> dict[str, Target]:
    """Map an attention.

    Its kernels of query, key and value are (dim, heads, head_dim), that of the output projection
    is (heads, head_dim, dim).
    """

    def merged(array: np.ndarray, axis: int) -> np.ndarray:
        """Merge an axis of heads with that of their features, which follows it."""
        if array.shape[axis] != num_heads:
            raise ValueError(f"expected {num_heads} heads, got {array.shape[axis]}")
        shape = (*array.shape[:axis], math.prod(array.shape[axis : axis + 2]))
        return array.reshape(*shape, *array.shape[axis + 2 :])

    targets = {
        f"{theirs}/out/kernel": Target(f"{ours}.out_proj.weight", lambda k: merged(k, 0).T),
        f"{theirs}/out/bias": Target(f"{ours}.out_proj.bias", _same),
    }
    for third, name in enumerate(("query", "key", "value")):
        targets[f"{theirs}/{name}/kernel"] = Target(
            f"{ours}.in_proj_weight", lambda k: merged(k, 1).T, third
        )
        targets[f"{theirs}/{name}/bias"] = Target(
            f"{ours}.in_proj_bias", lambda b: merged(b, 0), third
        )
    return targets
