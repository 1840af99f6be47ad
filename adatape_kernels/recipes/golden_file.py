"""Which arrays a golden file (SPEC 10) must have, of which shapes, and what it may ask to compute.

All of this is known from the configuration and from the headers of the arrays: a file is refused
before an array of it is read.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adatape_kernels import scenic
from adatape_kernels.data.npz_file import NpzFile
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeParityConfig, AdaTapeViTConfig, UViTConfig, ViTConfig
from adatape_kernels.models.encoder_config import MOST_VALUES
from adatape_kernels.models.value_checks import as_choice, as_integer, as_number
from adatape_kernels.ops.reading_checks import MAX_TOPK

MOST_TAPE_TOKENS = 1 << 14
"""Most tape tokens that an example of a file may have; each is a step of its own."""
MOST_MULTIPLICATIONS = 1 << 40
"""Most multiplications of a forward pass; 2**40 take a few minutes on a CPU."""

_FLOAT, _COUNT = np.dtype(np.float32), np.dtype(np.int32)
_SHOWN = 100


def check_read(arrays: NpzFile, config: Mapping[str, Any]) -> None:
    """Compare the headers of a file of kind tape_read with its configuration.

    Raises:
        ValueError: an entry of the configuration is out of range, an array is missing or of
            another shape or type, or the file asks for more than is reasonable.
        KeyError: an entry of the configuration, or an array, is missing.
    """
    as_choice("bank_type", config["bank_type"], ("input", "learn"))
    as_choice("loss_type", config["loss_type"], ("entropy", "max"))
    if not isinstance(config["average_query"], bool):
        raise ValueError(f"average_query: expected true or false, got {config['average_query']!r}")
    as_number("halt_threshold", config["halt_threshold"])
    steps = config["max_tape_tokens"]
    as_integer("max_tape_tokens", steps, 1, MOST_TAPE_TOKENS)
    bank_name = "params/tape_tokens" if config["bank_type"] == "learn" else "bank"
    batch, dim = _axes(arrays, "query", 2)
    bank_size = _axes(arrays, bank_name, 2 if config["bank_type"] == "learn" else 3)[-2]
    as_integer("split", config["split"], 1, dim)
    as_integer(
        "tokens_merged_per_step", config["tokens_merged_per_step"], 1, min(MAX_TOPK, bank_size)
    )
    for name, size in (("features", dim), ("bank_size", bank_size)):
        if config.get(name, size) != size:
            raise ValueError(f"{name}: expected {size}, as in the arrays, got {config[name]!r}")
    bank_shape: tuple[int, ...] = (bank_size, dim)
    if bank_name == "bank":
        bank_shape = (batch, *bank_shape)
    variables = {
        "query": (batch, dim),
        bank_name: bank_shape,
        "params/bank_norm/scale": (dim,),
        "params/bank_norm/bias": (dim,),
    }
    shapes = {
        **variables,
        "tokens": (batch, steps, dim),
        "cotangent_tokens": (batch, steps, dim),
        "atr_loss": (batch,),
        "cotangent_loss": (batch,),
        "n_read": (batch,),
        **{f"grad_{name}": shape for name, shape in variables.items()},
    }
    _check_headers(arrays, shapes)
    scores = batch * bank_size * steps
    _check_work(scores + batch * steps * dim, scores * (dim // config["split"]))


def check_model(arrays: NpzFile, config: AdaTapeViTConfig | AdaTapeParityConfig) -> None:
    """Compare the headers of a file of a whole model with its configuration.

    Raises:
        ValueError: an array is missing or of another shape or type, the model reads nothing, or the
            file asks for more than is reasonable.
        KeyError: an array is missing.
    """
    reads = len(config.read_layers)
    if not reads or not config.num_tape_tokens:
        raise ValueError("config: expected a model that reads a tape, got one that does not")
    params = arrays.below("params/")
    scenic.check_params(params, config)
    if isinstance(config, AdaTapeViTConfig):
        example: tuple[int, ...] = (config.image_size, config.image_size, config.in_channels)
        rows, bank = config.num_patches, config.bank_tokens
    else:
        example = (config.seq_len, config.element_dim)
        rows, bank = 1, config.seq_len
    rows += config.has_class_token
    positions = rows + reads * config.num_tape_tokens
    batch = _axes(arrays, "inputs", 1 + len(example))[0]
    as_integer("num_tape_tokens", reads * config.num_tape_tokens, 1, MOST_TAPE_TOKENS)
    param_shapes = {name: params.header(name).shape for name in params}
    shapes = {
        "inputs": (batch, *example),
        "logits": (batch, config.num_classes),
        "cotangent_logits": (batch, config.num_classes),
        "mask": (batch, positions),
        "atr_loss": (batch,),
        "grad_inputs": (batch, *example),
        **param_shapes,
        **{f"grad_{name}": shape for name, shape in param_shapes.items()},
    }
    _check_headers(arrays, shapes)
    widest = 4 * config.dim + 2 * config.ffn_dim + 2 * config.tape_ffn_dim
    values = config.depth * positions * (config.num_heads * positions + widest)
    values += bank * (config.dim + reads * config.num_tape_tokens)
    parameters = sum(map(math.prod, param_shapes.values()))
    products = positions * (parameters + 2 * config.depth * positions * config.dim)
    products += bank * config.dim * (config.dim + reads * config.num_tape_tokens)
    _check_work(batch * values, batch * products)


def check_baseline(arrays: NpzFile, config: ViTConfig) -> None:
    """Compare the headers of a file of kind vit or uvit with its configuration.

    Raises:
        ValueError: an array is missing or of another shape or type, or the file asks for more than
            is reasonable.
        KeyError: an array is missing.
    """
    params = arrays.below("params/")
    scenic.check_params(params, config)
    example = (config.image_size, config.image_size, config.in_channels)
    rows = config.num_patches + config.has_class_token
    batch = _axes(arrays, "inputs", 4)[0]
    param_shapes = {name: params.header(name).shape for name in params}
    shapes = {
        "inputs": (batch, *example),
        "logits": (batch, config.num_classes),
        "cotangent_logits": (batch, config.num_classes),
        "grad_inputs": (batch, *example),
        **param_shapes,
        **{f"grad_{name}": shape for name, shape in param_shapes.items()},
    }
    if isinstance(config, UViTConfig) and config.act_type != "none":
        units = (batch, rows) if config.act_level == "row" else (batch,)
        names = ("n_steps", "ponder_times", "remainders")
        shapes |= {**dict.fromkeys(names, units), "ponder_loss": ()}
        steps = _axes(arrays, "halting_scores", 1 + len(units))[0]
        as_integer("halting_scores: steps", steps, 1, config.depth)
        shapes |= dict.fromkeys(("halting_scores", "halting_probability"), (steps, *units))
    _check_headers(arrays, shapes)
    widths = 4 * config.dim + 2 * config.ffn_dim
    embedding = config.dim * config.in_channels * config.patch_size**2
    layer = config.dim * (widths + 2 * rows)
    _check_work(
        batch * config.depth * rows * (config.num_heads * rows + widths),
        batch * rows * (config.depth * layer + embedding),
    )


def _axes(arrays: NpzFile, name: str, number: int) -> tuple[int, ...]:
    """Return the shape of an array, of which no axis may be empty."""
    shape = arrays.header(name).shape
    if len(shape) != number or 0 in shape:
        raise ValueError(
            f"{name}: expected {number} axes that are not empty, got {printable(shape, _SHOWN)}"
        )
    return shape


def _check_headers(arrays: NpzFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare shapes and types, and see that no parameter or gradient is left over."""
    for name, shape in shapes.items():
        header = arrays.header(name)
        dtype = _COUNT if name in ("n_read", "n_steps") else _FLOAT
        if header.shape != shape or header.dtype != dtype:
            raise ValueError(
                f"{name}: expected {shape} {dtype}, "
                f"got {printable(header.shape, _SHOWN)} {header.dtype}"
            )
    for name in arrays:
        if name.startswith(("params/", "grad_")) and name not in shapes:
            shown = printable(name, _SHOWN)
            raise ValueError(f"{shown}: expected no such entry for this config, got one")


def _check_work(values: int, products: int) -> None:
    """Raise ValueError where a forward pass would take too much memory or time."""
    if values > MOST_VALUES:
        raise ValueError(
            f"sizes: expected up to {MOST_VALUES} values in a forward pass, got {values}"
        )
    if products > MOST_MULTIPLICATIONS:
        raise ValueError(
            f"sizes: expected up to {MOST_MULTIPLICATIONS} multiplications, got {products}"
        )
