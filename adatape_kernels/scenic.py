"""Parameters of the public JAX code (google-research/scenic, projects/adatape) in our models.

Scenic's tree of parameters is given flattened, with names such as `params/a/b/c`, and its
configuration as JSON (SPEC 10), which `model_config` translates. `parameter_map` states for each of
scenic's parameters which of our parameters it fills and how its axes are rearranged.
"""

import contextlib
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.npz_file import NpzFile, UnreadableFile
from adatape_kernels.data.printable import printable
from adatape_kernels.models import (
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
    Classifier,
    EncoderConfig,
    UViT,
    UViTConfig,
    ViT,
    ViTConfig,
)
from adatape_kernels.models.scenic_config import model_config
from adatape_kernels.models.scenic_targets import Target, targets_of

_MOST_CONFIG_BYTES = 1 << 20
_SHOWN = 300
# Configurations before those that they extend.
_MODELS: dict[type[EncoderConfig], Callable[[Any], Classifier]] = {
    AdaTapeViTConfig: AdaTapeViT,
    AdaTapeParityConfig: AdaTapeParity,
    UViTConfig: UViT,
    ViTConfig: ViT,
}


def load(params: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Classifier:
    """Build a model from scenic's flattened parameters and configuration.

    Args:
        params: float32 arrays by name, `a/b/c` or `params/a/b/c`.
        config: entries by the names of SPEC 10.

    Returns:
        An AdaTapeViT, AdaTapeParity, UViT or ViT in float32 on torch's default device. Its images
        are (batch, channels, height, width), whereas scenic has the channels last.

    Raises:
        ValueError: an entry of the configuration, or a parameter, is missing, left over or of
            another shape than the configuration says.

    Source: SPEC 10 and 11; scenic adatape/layers.py.

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
        target.fill(state, np.asarray(params[name], dtype=np.float32))
    return model


def check_params(params: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, Target]:
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
    for pattern, target in targets_of(config):
        name = _only_match(pattern, stored) if "*" in pattern else pattern
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


def _only_match(pattern: str, names: Iterable[str]) -> str:
    """Return the one name that a pattern fits, or the pattern where there is none or several."""
    found = fnmatch.filter(names, pattern)
    return found[0] if len(found) == 1 else pattern


def _build(config: EncoderConfig) -> Classifier:
    for kind, model in _MODELS.items():
        if isinstance(config, kind):
            return model(config)
    raise ValueError(f"config: expected that of a model of scenic, got {type(config).__name__}")


def load_file(path: str | Path) -> Classifier:
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


def parameter_map(model: Classifier) -> dict[str, Target]:
    """Return what each of scenic's parameters fills in a model, by its name without `params/`.

    An asterisk stands for the part of a name that flax made up, of a UViT's halting unit.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
        >>> ak.scenic.parameter_map(model)["output_projection/kernel"].key
        'head.weight'
    """
    return dict(targets_of(model.config))
