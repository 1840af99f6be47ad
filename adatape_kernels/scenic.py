"""Parameters of the public JAX code (google-research/scenic, projects/adatape) in our models.

Scenic's parameter tree comes flattened to `params/a/b/c` with its configuration as JSON (SPEC 10).
`parameter_map` says for each of scenic's parameters which of ours it fills, and how it turns.
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
    """Which of our parameters one of scenic's fills."""

    key: str
    """The parameter's name in our state dict."""
    convert: Callable[[np.ndarray], np.ndarray]
    """Turns scenic's array, or its gradient, into ours."""
    third: int | None = None
    """Which third of our parameter's rows it fills, None for the whole."""

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the part of our tensors, by parameter name, that scenic's array stands for."""
        tensor = tensors[self.key]
        return tensor if self.third is None else tensor.chunk(3)[self.third]


def model_config(config: Mapping[str, Any]) -> AdaTapeViTConfig | AdaTapeParityConfig:
    """Translate scenic's configuration, as SPEC 10 names it, into ours.

    Raises:
        ValueError: an entry is missing or has a value that is not offered here.
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
        params: arrays by name, `a/b/c` or `params/a/b/c`.
        config: as in SPEC 10.

    Returns:
        An AdaTapeViT or AdaTapeParity in float32. Images are (batch, channels, height, width).

    Raises:
        ValueError: an entry of the configuration, or a parameter, is missing, left over or of
            another shape than the configuration says.
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
    """Build a model from an .npz file with `config` and `params/…`, as in SPEC 10.

    Raises:
        ValueError: the file cannot be read, or as in `load`.
    """
    arrays = read_npz(path)
    config = read_config(arrays, path)
    return load({k: v for k, v in arrays.items() if k.startswith("params/")}, config)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read every array of an .npz file; never unpickles.

    Raises:
        ValueError: the file is missing, cut, no .npz file, or holds pickled objects.
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
    """Parse the `config` entry, a JSON object. Raises ValueError, naming the file."""
    try:
        config = json.loads(str(arrays["config"]))
    except (KeyError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an entry 'config' with a JSON object, got none")
    return config


def parameter_map(model: AdaTape) -> dict[str, Target]:
    """Return what each of scenic's parameters, named without `params/`, fills in this model."""
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
    """Kernels are (in, out)."""
    return {
        f"{theirs}/kernel": Target(f"{ours}.weight", np.transpose),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _convolution(theirs: str, ours: str) -> dict[str, Target]:
    """Kernels are (height, width, in, out)."""
    return {
        f"{theirs}/kernel": Target(f"{ours}.weight", lambda k: k.transpose(3, 2, 0, 1)),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _norm(theirs: str, ours: str) -> dict[str, Target]:
    return {
        f"{theirs}/scale": Target(f"{ours}.weight", _same),
        f"{theirs}/bias": Target(f"{ours}.bias", _same),
    }


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    """Kernels of query, key and value are (dim, heads, head_dim), out's (heads, head_dim, dim)."""
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
