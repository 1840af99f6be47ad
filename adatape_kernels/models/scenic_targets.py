"""Which of our parameters each parameter of the public JAX code (google-research/scenic) fills.

The names are those of scenic's tree, flattened, without `params/` (SPEC 10).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.models.compared import UViTConfig
from adatape_kernels.models.config import AdaTapeConfig
from adatape_kernels.models.encoder_config import EncoderConfig
from adatape_kernels.models.image_config import ViTConfig
from adatape_kernels.models.parity import AdaTapeParityConfig

HALTING_UNIT = "UTransformer/act/*/act_step/step_halting_prob"
"""The name of a UViT's halting unit, in which flax makes up the part that is an asterisk here."""


class Target(NamedTuple):
    """The parameter of ours, or the third of it, that one of scenic's parameters fills."""

    key: str
    """Name of our parameter in the model's state dict."""
    convert: Callable[[np.ndarray], np.ndarray]
    """Rearranges scenic's array, or its gradient, to the shape of ours."""
    third: int | None = None
    """Which third of our parameter's rows is filled, 0, 1 or 2; None where all rows are."""
    stacked: int | None = None
    """How many layers' parameters lie stacked in scenic's array; `key` has {} for the layer."""

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what scenic's parameter fills: a view into the one of our tensors, by name.

        Where scenic's parameter fills those of several layers it is a copy of all of them, stacked.
        """
        if self.stacked is not None:
            return torch.stack([layer.of(tensors) for layer in self._layers()])
        tensor = tensors[self.key]
        return tensor if self.third is None else tensor.chunk(3)[self.third]

    def fill(self, tensors: Mapping[str, Tensor], array: np.ndarray) -> None:
        """Copy one of scenic's parameters into ours."""
        if self.stacked is not None:
            for layer, part in zip(self._layers(), array, strict=True):
                layer.fill(tensors, part)
        else:
            self.of(tensors).copy_(torch.from_numpy(self.convert(array)))

    def converted(self, array: np.ndarray) -> np.ndarray:
        """Return one of scenic's arrays, or its gradient, in the shape of what `of` returns."""
        if self.stacked is None:
            return self.convert(array)
        return np.stack([self.convert(part) for part in array])

    def shape(self, theirs: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape that one of scenic's arrays has here, or None where it fits nothing."""
        front = tuple(theirs[:1]) if self.stacked is not None else ()
        if self.stacked is not None and front != (self.stacked,):
            return None
        try:
            # A single number seen as an array of any shape takes no memory.
            own = theirs[len(front) :]
            return (*front, *self.convert(np.broadcast_to(np.float32(0), own)).shape)
        except (ValueError, IndexError, TypeError):
            return None

    def _layers(self) -> "Iterator[Target]":
        for layer in range(self.stacked or 0):
            yield self._replace(key=self.key.format(layer), stacked=None)


def targets_of(config: EncoderConfig) -> Iterator[tuple[str, Target]]:
    """Yield what each of scenic's parameters fills, layer after layer.

    Args:
        config: that of a model which scenic has: AdaTape, ViT or UViT.

    Example:
        >>> import adatape_kernels as ak
        >>> from adatape_kernels.models.scenic_targets import targets_of
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
        >>> dict(targets_of(model.config))["output_projection/kernel"].key
        'head.weight'
    """
    yield from _dense("output_projection", "head").items()
    if config.representation_size:
        yield from _dense("pre_logits", "head.pre_logits").items()
    if config.has_class_token:
        yield "cls", Target("class_token", _same)
    if isinstance(config, UViTConfig):
        yield from _of_uvit(config)
    elif isinstance(config, AdaTapeConfig):
        yield from _of_adatape(config)
    elif isinstance(config, ViTConfig):
        yield from _of_image("Transformer/posembed_input").items()
        yield from _norm("Transformer/encoder_norm", "encoder.norm").items()
        for layer in range(config.depth):
            yield from _block(f"Transformer/encoderblock_{layer}", f"{layer}", config).items()


def _of_image(positions: str) -> dict[str, Target]:
    """Map the embedding of patches and the positions."""
    targets = _convolution("embedding", "patch_embed")
    targets[f"{positions}/pos_embedding"] = Target("position", _same)
    return targets


def _of_uvit(config: UViTConfig) -> Iterator[tuple[str, Target]]:
    yield from _of_image("UTransformer/posembed_input").items()
    yield from _norm("UTransformer/encoder_norm", "encoder.norm").items()
    halts = config.act_type != "none"
    if halts:
        yield from _dense(HALTING_UNIT, "encoder.unit.projection").items()
    if config.num_layers == 1:
        yield from _block("UTransformer/encoderblock", "0", config).items()
    elif halts:
        for name, target in _block("UTransformer/encoderblock", "{}", config).items():
            yield name, target._replace(stacked=config.num_layers)
    else:
        for layer in range(config.depth):
            yield from _block(f"UTransformer/encoderblock_{layer}", f"{layer}", config).items()


def _of_adatape(config: AdaTapeConfig) -> Iterator[tuple[str, Target]]:
    learned = config.bank == "learn"
    targets = _norm("Transformer/encoder_norm", "encoder.norm")
    if isinstance(config, ViTConfig):
        targets |= _of_image("posembed_input")
        if not learned:
            targets |= _convolution("embedding_bank", "bank_embed")
            targets["posembed_input_bank/pos_embedding"] = Target("bank_position", _same)
    else:
        assert isinstance(config, AdaTapeParityConfig)
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
        targets = _block(theirs, f"{layer}", config)
        if config.tape_ffn_dim and layer >= first_read:
            targets |= _dense(f"{theirs}/tape_mlp/Dense_0", f"{ours}.tape_linear1")
            targets |= _dense(f"{theirs}/tape_mlp/Dense_1", f"{ours}.tape_linear2")
        yield from targets.items()


def _block(theirs: str, layer: str, config: EncoderConfig) -> dict[str, Target]:
    """Map a layer without what it has for tape rows."""
    ours = f"encoder.layers.{layer}"
    return {
        **_norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1"),
        **_norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2"),
        **_attention(
            f"{theirs}/MultiHeadDotProductAttention_0", f"{ours}.self_attn", config.num_heads
        ),
        **_dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.linear1"),
        **_dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.linear2"),
    }


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
