"""The configuration of the public JAX code's models (google-research/scenic) as one of ours.

It comes from a file that anyone may have written: every entry may be missing, or of any type.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from adatape_kernels.layers import NORM_EPS, QueryType
from adatape_kernels.models.compared import UViTConfig
from adatape_kernels.models.compared.halting_config import HaltingLevel
from adatape_kernels.models.encoder_config import MOST_TOKENS, EncoderConfig
from adatape_kernels.models.image_config import ViTConfig
from adatape_kernels.models.parity import AdaTapeParityConfig
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.models.vit import AdaTapeViTConfig
from adatape_kernels.ops.reading_checks import MAX_TOPK
from adatape_kernels.pooling import Pooling

_POOLINGS = {"token": "token", "gap": "mean", "gmp": "max", "gsp": "sum"}
_LEVELS: dict[str, HaltingLevel] = {"per_example": "example", "per_token": "row"}
_MOST_CHARACTERS = 300


def model_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Translate scenic's configuration into ours.

    Args:
        config: entries by the names of SPEC 10.

    Raises:
        ValueError: an entry is missing or has a value that is not offered here.

    Source: SPEC 9 and 10.
    """
    try:
        if config.get("kind") == "vit":
            return ViTConfig(**_plain_fields(config))
        if config.get("kind") == "uvit":
            return _uvit_config(config)
        return _adatape_config(config)
    except KeyError as error:
        raise ValueError(f"config: expected an entry {error}, got none") from None
    except ValueError as error:
        raise ValueError(str(error)[:_MOST_CHARACTERS]) from None
    except (TypeError, OverflowError) as error:
        got = str(error)[:_MOST_CHARACTERS]
        raise ValueError(f"config: expected entries of SPEC 10's types, got: {got}") from None


def _plain_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ViTConfig."""
    offered, represented = "learned_1d", config.get("representation_size")
    if config.get("positional_embedding", offered) != offered:
        raise ValueError(
            f"config: expected positional_embedding {offered!r}, "
            f"got {config['positional_embedding']!r}"
        )
    if represented is not None:
        if config["kind"] != "vit":
            raise ValueError(f"config: expected representation_size null, got {represented!r}")
        as_integer("representation_size", represented, 1)
    first = config["classifier"] == "0"
    return {
        "num_classes": config["num_classes"],
        "dim": config["hidden_size"],
        "depth": config["num_layers"],
        "num_heads": config["num_heads"],
        "ffn_dim": config["mlp_dim"],
        "pooling": "token" if first else _pooling(config),
        "class_token": not first,
        "representation_size": represented or 0,
        "activation": "gelu_tanh",
        "norm_eps": NORM_EPS,
        "image_size": config["image"],
        "patch_size": config["patch"],
    }


def _pooling(config: Mapping[str, Any]) -> Pooling:
    if config["classifier"] not in _POOLINGS:
        also = "" if "adatape" in str(config["kind"]) else ", 0"
        raise ValueError(
            f"config: expected classifier {', '.join(_POOLINGS)}{also}, "
            f"got {config['classifier']!r}"
        )
    return cast(Pooling, _POOLINGS[config["classifier"]])


def _uvit_config(config: Mapping[str, Any]) -> UViTConfig:
    """Translate a configuration of a UViT, whose depth is act_max_steps where it halts."""
    fields, act = _plain_fields(config), config["ac_config"]
    as_flag("parameter_sharing", config["parameter_sharing"])
    fields["distinct_layers"] = 1 if config["parameter_sharing"] else 0
    if act is None:
        return UViTConfig(**fields, act_type="none")
    if not isinstance(act, Mapping):
        raise ValueError(f"config: expected ac_config with entries, or null, got {act!r}")
    if act["act_type"] == "random":
        raise ValueError(
            "act_type: expected basic or accumulated, as JAX alone draws the numbers of random, "
            "got 'random'"
        )
    as_choice("act_type", act["act_type"], ("basic", "accumulated"))
    as_choice("act_level", act["act_level"], [*_LEVELS])
    return UViTConfig(
        **{**fields, "depth": act["act_max_steps"]},
        act_epsilon=act["act_epsilon"],
        act_type=act["act_type"],
        act_level=_LEVELS[act["act_level"]],
        halting_bias_init=act["act_halting_bias_init"],
        ponder_weight=act["act_loss_weight"],
    )


def _adatape_config(config: Mapping[str, Any]) -> AdaTapeViTConfig | AdaTapeParityConfig:
    """Translate a configuration of an AdaTape, whose entries may be missing or of any type."""
    halting = config["dynamic_tape_length"]
    if not isinstance(halting, Mapping):
        raise ValueError(f"config: expected dynamic_tape_length with entries, got {halting!r}")
    if halting["num_token_per_step"] != 1:
        raise ValueError(
            f"config: expected num_token_per_step 1 (SPEC 9), got {halting['num_token_per_step']!r}"
        )
    if -1 in config["add_tape_token_to_layers"]:
        raise ValueError("config: expected layers from 0 on (SPEC 9), got -1")
    if config["bank_norm"] is not True:
        raise ValueError(f"config: expected bank_norm true, got {config['bank_norm']!r}")
    pooling = _pooling(config)
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
        "topk": _topk(config["num_tape_tokens"], halting["act_epsilon"]),
        "halt_threshold": float(halting["act_epsilon"]),
        "key_split": config["split_tt"],
        "average_query": halting["complex_query"],
        "loss_type": halting["act_loss_type"],
        "query": cast(QueryType, config["query_type"]),
        "read_layers": tuple(config["add_tape_token_to_layers"]),
        "tape_mlp_dim": config["tt_mlp_dim"],
        "pooling": pooling,
        "ponder_weight": halting["act_loss_weight"],
        "query_noise": halting["query_noise"],
        "bank_dropout": halting["bernoulli_p"],
        "activation": "gelu_tanh",
        "norm_eps": NORM_EPS,
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
    raise ValueError(
        f"config: expected kind adatape_vit, adatape_parity, vit or uvit, got {config['kind']!r}"
    )


def _topk(num_tape_tokens: object, act_epsilon: object) -> int:
    """Return k = T // τ, which scenic's configuration leaves to be computed."""
    as_integer("num_tape_tokens", num_tape_tokens, 0, MOST_TOKENS)
    tau = as_number("act_epsilon", act_epsilon)
    topk = cast(int, num_tape_tokens) // tau if tau > 0 else math.inf
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(
            f"act_epsilon: expected num_tape_tokens // act_epsilon to be 1 to {MAX_TOPK}, "
            f"got {num_tape_tokens} // {act_epsilon!r}"
        )
    return int(topk)
