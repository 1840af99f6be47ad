"""The models of the parity table, each with about as many parameters as AdaTape."""

from collections.abc import Callable
from typing import Any

import torch

from adatape_kernels.models import (
    AdaTapeParity,
    AdaTapeParityConfig,
    Classifier,
    Transformer,
    TransformerConfig,
    UniversalTransformer,
    UniversalTransformerConfig,
)
from adatape_kernels.recipes.parity.fixed_query import FixedQueryReader

_DIM, _DEPTH, _HEADS = 96, 2, 4
# Without a sequence token a key is so small a part of a token. Scores by short keys are close to
# one another, so that a step which splits a pair of ones shows both of its symbols; where one of
# them weighs nearly 1 instead, the pair looks like a pair of ones, and no gradient tells otherwise.
_KEY_SPLIT = 8
# Number of steps that a Universal Transformer may take.
_UNIVERSAL_STEPS = 6
# Widths are tried in steps in which each head stays a multiple of 2 wide.
_WIDTH_STEP = 2 * _HEADS
_WIDEST = 256


def _adatape(
    length: int,
    sequence_token: bool,
    topk: int = 2,
    key_split: int | None = None,
    **choices: Any,
) -> AdaTapeParity:
    if key_split is None:
        key_split = 1 if sequence_token else _KEY_SPLIT
    # Of the entries that a step reads the best weighs 1 / topk or more: the threshold lets an
    # example read its whole bank where they always weigh the same.
    reads = -(-length // topk)
    return AdaTapeParity(
        AdaTapeParityConfig(
            num_classes=2,
            dim=_DIM,
            depth=_DEPTH,
            num_heads=_HEADS,
            ffn_dim=2 * _DIM,
            num_tape_tokens=reads,
            halt_threshold=reads / topk,
            topk=min(topk, length),
            key_split=key_split,
            seq_len=length,
            sequence_token=sequence_token,
            **choices,
        )
    )


def _last_read(length: int, sequence_token: bool) -> AdaTapeParity:
    return _adatape(length, sequence_token, average_query=False)


def _fixed_query(length: int, sequence_token: bool) -> AdaTapeParity:
    model = _adatape(length, sequence_token)
    # The class alone differs: it has the same parameters and the same choices.
    model.encoder.readers["0"].__class__ = FixedQueryReader
    return model


def _one_by_one(length: int, sequence_token: bool) -> AdaTapeParity:
    return _adatape(length, sequence_token, topk=1)


def _wide_keys(length: int, sequence_token: bool) -> AdaTapeParity:
    return _adatape(length, sequence_token, key_split=1)


def _transformer(length: int, dim: int, ffn_dim: int) -> Transformer:
    return Transformer(
        TransformerConfig(
            num_classes=2,
            dim=dim,
            depth=_DEPTH,
            num_heads=_HEADS,
            ffn_dim=ffn_dim,
            seq_len=length,
        )
    )


def _universal(length: int, dim: int, ffn_dim: int) -> UniversalTransformer:
    return UniversalTransformer(
        UniversalTransformerConfig(
            num_classes=2,
            dim=dim,
            depth=_UNIVERSAL_STEPS,
            num_heads=_HEADS,
            ffn_dim=ffn_dim,
            seq_len=length,
        )
    )


def _as_large(make: Callable[[int, int, int], Classifier]) -> Callable[[int, bool], Classifier]:
    """Return what makes a model as large as AdaTape, by its width and that of its feed-forward."""

    def made(length: int, sequence_token: bool) -> Classifier:
        with torch.device("meta"):
            size = num_parameters(_adatape(length, sequence_token))

            def distance(dim: int, ffn_dim: int) -> int:
                return abs(num_parameters(make(length, dim, ffn_dim)) - size)

            widths = range(_WIDTH_STEP, _WIDEST + 1, _WIDTH_STEP)
            dim = min(widths, key=lambda dim: distance(dim, 2 * dim))
            near = range(dim, 3 * dim, _WIDTH_STEP)
            ffn_dim = min(near, key=lambda ffn_dim: distance(dim, ffn_dim))
        return make(length, dim, ffn_dim)

    return made


_MODELS: dict[str, Callable[[int, bool], Classifier]] = {
    "adatape": _adatape,
    "transformer": _as_large(_transformer),
    "universal": _as_large(_universal),
    "adatape-last-read": _last_read,
    "adatape-fixed-query": _fixed_query,
    "adatape-one-by-one": _one_by_one,
    "adatape-wide-keys": _wide_keys,
}

MODELS = tuple(_MODELS)
"""The names of the models.

The last four are ablations of AdaTape: a new query that is what was read alone, a query that never
moves, steps that read one entry instead of two, and keys that are whole tokens, as AdaTape has them
beside a sequence token.
"""


def new_model(name: str, length: int, *, sequence_token: bool = True) -> Classifier:
    """Return a new model for sequences of a length.

    Args:
        name: one of MODELS.
        length: number of symbols of a sequence.
        sequence_token: whether AdaTape sees the sequence as a token beside its tape. The dense
            layer that makes the token knows only sequences like those that it was trained on. A
            model without it has short keys.
    """
    return _MODELS[name](length, sequence_token)


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
