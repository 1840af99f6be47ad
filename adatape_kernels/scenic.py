"""Parameters of the public JAX code (google-research/scenic, projects/adatape) in our models.

Scenic's tree of parameters is given flattened, with names such as `params/a/b/c`, and its
configuration as JSON (SPEC 10). `parameter_map` states for each of scenic's parameters which of our
parameters it fills and how its axes are rearranged.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.elastic import Pooling
from adatape_kernels.layers import QueryType, TapeReader
from adatape_kernels.models import (
    AdaTape,
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
)

_POOLINGS = {"token": "token", "gap": "mean", "gmp": "max", "gsp": "sum"}


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


def model_config(config: Mapping[str, Any]) -> AdaTapeViTConfig | AdaTapeParityConfig:
    """Translate scenic's configuration into ours.

    Args:
        config: entries by the names of SPEC 10.

    Raises:
        ValueError: an entry is missing or has a value that is not offered here.

    Source: SPEC 9 and 10.
    """
    try:
        halting = config["dynamic_tape_length"]
        if halting["num_token_per_step"] != 1:
            raise ValueError(
                "config: expected num_token_per_step 1 (SPEC 9), "
                f"got {halting['num_token_per_step']}"
            )
        if -1 in config["add_tape_token_to_layers"]:
            raise ValueError("config: expected layers from 0 on (SPEC 9), got -1")
        if not config["bank_norm"]:
            raise ValueError("config: expected bank_norm true, got false")
        if config["classifier"] not in _POOLINGS:
            raise ValueError(
                f"config: expected classifier {', '.join(_POOLINGS)}, got {config['classifier']!r}"
            )
        shared: dict[str, Any] = {
            "num_classes": config["num_classes"],
            "dim": config["hidden_size"],
            "depth": config["num_layers"],
            "num_heads": config["num_heads"],
            "ffn_dim": config["mlp_dim"],
            "tape_ffn_dim": config["enc_tt_mlp_dim"],
            "bank": cast(Literal["input", "learn"], config["bank_type"]),
            "bank_size": config["tape_bank_size"],
            "num_tape_tokens": config["num_tape_tokens"],
            "topk": int(config["num_tape_tokens"] // halting["act_epsilon"]),
            "halt_threshold": float(halting["act_epsilon"]),
            "key_split": config["split_tt"],
            "average_query": halting["complex_query"],
            "loss_type": halting["act_loss_type"],
            "query": cast(QueryType, config["query_type"]),
            "read_layers": tuple(config["add_tape_token_to_layers"]),
            "tape_mlp_dim": config["tt_mlp_dim"],
            "pooling": cast(Pooling, _POOLINGS[config["classifier"]]),
            "ponder_weight": halting["act_loss_weight"],
            "query_noise": halting["query_noise"],
            "bank_dropout": halting["bernoulli_p"],
            "activation": "gelu_tanh",
        }
        if config["kind"] == "adatape_vit":
            return AdaTapeViTConfig(
                **shared,
                image_size=config["image"],
                patch_size=config["patch"],
                bank_patch_size=config["patch_bank_size"],
            )
        if config["kind"] == "adatape_parity":
            return AdaTapeParityConfig(**shared, seq_len=config["seq_len"])
    except KeyError as error:
        raise ValueError(f"config: expected an entry {error}, got none") from None
    raise ValueError(f"config: expected kind adatape_vit or adatape_parity, got {config['kind']!r}")


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
    try:
        model = _build(model_config(config))
    except TypeError as error:
        raise ValueError(f"config: expected entries of SPEC 10's types, got: {error}") from None
    params = {name.removeprefix("params/"): array for name, array in params.items()}
    targets, state = parameter_map(model), model.state_dict()
    for name in params.keys() ^ targets.keys():
        expected, got = ("one", "none") if name in targets else ("none", "one")
        raise ValueError(f"params: expected {expected} named {name!r} for this config, got {got}")
    for name, target in targets.items():
        ours, theirs = target.of(state), torch.from_numpy(target.convert(params[name]))
        if ours.shape != theirs.shape:
            raise ValueError(
                f"params: expected {name} to fill {target.key} {tuple(ours.shape)}, "
                f"got {tuple(theirs.shape)}"
            )
        ours.copy_(theirs)
    return model


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
    arrays = read_npz(path)
    config = read_config(arrays, path)
    return load({k: v for k, v in arrays.items() if k.startswith("params/")}, config)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read every array of an .npz file, and unpickle nothing.

    Raises:
        ValueError: the file is missing, cut, no .npz file, or holds pickled objects.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.scenic.read_npz("absent.npz")
        Traceback (most recent call last):
        ValueError: absent.npz: expected a readable .npz file, got: no such file
    """
    if not zipfile.is_zipfile(path):
        reason = "not a zip archive" if Path(path).exists() else "no such file"
        raise ValueError(f"{path}: expected a readable .npz file, got: {reason}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a readable .npz file, got: {reason}") from None


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
    try:
        config = json.loads(str(arrays["config"]))
    except (KeyError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an entry 'config' with a JSON object, got none")
    return config


def parameter_map(model: AdaTape) -> dict[str, Target]:
    """Return what each of scenic's parameters fills in a model, by its name without `params/`.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
        >>> ak.scenic.parameter_map(model)["output_projection/kernel"].key
        'head.weight'
    """
    targets = {
        **_dense("output_projection", "head"),
        **_norm("Transformer/encoder_norm", "encoder.norm"),
    }
    if model.class_token is not None:
        targets["cls"] = Target("class_token", _same)
    if isinstance(model, AdaTapeViT):
        targets |= _convolution("embedding", "patch_embed")
        targets["posembed_input/pos_embedding"] = Target("position", _same)
        if model.config.bank == "input":
            targets |= _convolution("embedding_bank", "bank_embed")
            targets["posembed_input_bank/pos_embedding"] = Target("bank_position", _same)
    else:
        targets |= _dense("embedding", "sequence_embed")
    if model.config.bank == "input":
        targets |= _dense("pre_bank", "pre_bank")
    reads = 0
    for index, (layer, reader) in enumerate(model.encoder.stages()):
        if reader is not None:
            targets |= _reader(f"Transformer/AddTapeToken_{reads}", index, reader)
            reads += 1
        theirs, ours = f"Transformer/encoderblock_{index}", f"encoder.layers.{index}"
        targets |= _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        targets |= _norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
        targets |= _attention(f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}.self_attn")
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.linear1")
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.linear2")
        if layer.has_tape_ffn:
            targets |= _dense(f"{theirs}/tape_mlp/Dense_0", f"{ours}.tape_linear1")
            targets |= _dense(f"{theirs}/tape_mlp/Dense_1", f"{ours}.tape_linear2")
    return targets


def _reader(theirs: str, layer: int, reader: TapeReader) -> dict[str, Target]:
    """Map a read, the norm, learnable bank and feed-forward that it has."""
    ours = f"encoder.readers.{layer}"
    targets = _norm(f"{theirs}/TapeBank_0/bank_norm", f"{ours}.bank_norm")
    if reader.tape_tokens is not None:
        targets[f"{theirs}/TapeBank_0/tape_tokens"] = Target(f"{ours}.tape_tokens", _same)
    if reader.tape_mlp is not None:
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.tape_mlp.0")
        targets |= _dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.tape_mlp.2")
    return targets


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


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    """Map an attention.

    Its kernels of query, key and value are (dim, heads, head_dim), that of the output projection
    is (heads, head_dim, dim).
    """
    targets = {
        f"{theirs}/out/kernel": Target(
            f"{ours}.out_proj.weight", lambda k: k.reshape(-1, k.shape[-1]).T
        ),
        f"{theirs}/out/bias": Target(f"{ours}.out_proj.bias", _same),
    }
    for third, name in enumerate(("query", "key", "value")):
        targets[f"{theirs}/{name}/kernel"] = Target(
            f"{ours}.in_proj_weight", lambda k: k.reshape(len(k), -1).T, third
        )
        targets[f"{theirs}/{name}/bias"] = Target(f"{ours}.in_proj_bias", np.ravel, third)
    return targets
