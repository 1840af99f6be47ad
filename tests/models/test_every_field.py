"""Every field of every configuration refuses what it cannot be, in one line that names it.

A field without an entry in the tables below fails the first test.
"""

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from adatape_kernels.models import (
    AdaTape,
    AdaTapeConfig,
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
    AViTConfig,
    EncoderConfig,
    PaddedAdaTape,
    TransformerConfig,
    UniversalTransformerConfig,
    UViTConfig,
    ViTConfig,
    adatape_vit,
)
from adatape_kernels.models.encoder_config import MOST_LAYERS
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import TrainPlan

HUGE = 10**30
UNWRITABLE = 10**5000  # Python refuses to write it in decimal
ODD = (None, 1j, "3", b"3", (), [1], {}, object(), np.array([1, 2]), torch.ones(2, 2))
NO_INTEGER = (*ODD, True, False, 1.0, 2.5, math.nan, math.inf, Fraction(1, 2), torch.tensor(1))
NO_NUMBER = (*ODD, True, False, math.nan, np.float32("nan"), UNWRITABLE, torch.tensor(1.0))
NO_WORD = (None, 1, True, 1j, "", "foo", b"gelu", ("input",), np.array(["a", "b"]), "a\nb")
NO_FLAG = (None, 0, 1, 1.0, "True", np.bool_(True), torch.tensor(True))

COUNT = (*NO_INTEGER, 0, -1, -HUGE, HUGE, UNWRITABLE)
WIDTH = (*NO_INTEGER, -1, -HUGE, HUGE, UNWRITABLE)
SHARE = (*NO_NUMBER, -0.1, -math.inf, math.inf, 1.1, HUGE)
PROBABILITY = (*SHARE, 1.0)
FACTOR = (*NO_NUMBER, -0.1, -math.inf, math.inf)
POSITIVE = (*FACTOR, 0, 0.0)
RANGE = (3, "01", {}, (1.0,), (0, 1, 2), (2, 1), (1, 1), (0, math.inf), (math.nan, 1), ("0", 1))

MODEL = {
    "num_classes": COUNT,
    "dim": COUNT,
    "depth": (*COUNT, MOST_LAYERS + 1),
    "num_heads": (*COUNT, 5, 48),
    "ffn_dim": COUNT,
    "tape_ffn_dim": WIDTH,
    "bank": NO_WORD,
    "bank_size": COUNT,
    "num_tape_tokens": WIDTH,
    "topk": (*COUNT, 33),
    "halt_threshold": NO_NUMBER,
    "key_split": (*COUNT, 25),
    "average_query": NO_FLAG,
    "loss_type": NO_WORD,
    "query": NO_WORD,
    "read_layers": (None, 0, "0", {0}, (1,), (-1,), (0, 0), (0.0,), (True,), (None,), (HUGE,)),
    "tape_mlp_dim": WIDTH,
    "pooling": NO_WORD,
    "ponder_weight": FACTOR,
    "dropout": PROBABILITY,
    "attention_dropout": PROBABILITY,
    "stochastic_depth": PROBABILITY,
    "query_noise": FACTOR,
    "bank_dropout": PROBABILITY,
    "activation": NO_WORD,
    "norm_eps": POSITIVE,
    "norm_after_pooling": NO_FLAG,
    "num_registers": WIDTH,
    "class_token": NO_FLAG,
    "representation_size": WIDTH,
}
IMAGES = {
    **MODEL,
    "image_size": COUNT,
    "in_channels": COUNT,
    "patch_size": (*COUNT, 3, 32),
    "bank_patch_size": (*COUNT, 3, 32),
    "pre_norm": NO_FLAG,
}
SEQUENCES = {**MODEL, "seq_len": COUNT, "element_dim": COUNT}
ENCODER = {
    name: MODEL[name]
    for name in (
        "num_classes dim depth num_heads ffn_dim pooling dropout attention_dropout "
        "stochastic_depth activation norm_eps norm_after_pooling num_registers "
        "class_token representation_size"
    ).split()
}
EPSILON = (*NO_NUMBER, 0, 1, -0.1, 1.1, math.inf)
FINITE = (*NO_NUMBER, math.inf, -math.inf)
UNIVERSAL = {
    "distinct_layers": (*NO_INTEGER, -1, 2, HUGE),
    "act_epsilon": EPSILON,
    "act_type": NO_WORD,
    "act_level": NO_WORD,
    "leave": (*NO_WORD, "row"),
    "force_halt": NO_FLAG,
    "halting_bias_init": FINITE,
    "ponder_weight": FACTOR,
}
PIXELS = {name: IMAGES[name] for name in ("image_size", "in_channels", "patch_size", "pre_norm")}
ELEMENTS = {name: SEQUENCES[name] for name in ("seq_len", "element_dim")}
AVIT = {
    "act_epsilon": EPSILON,
    "gate_scale": FINITE,
    "gate_center": FINITE,
    "keep_class_token": NO_FLAG,
    "ponder_weight": FACTOR,
    "distribution_weight": FACTOR,
    "distribution_center": (*NO_NUMBER, 0, -1, 1.1, math.inf),
}
PLAN = {
    "epochs": COUNT,
    "batch": (*NO_INTEGER, 0, -1),
    "learning_rate": POSITIVE,
    "weight_decay": FACTOR,
    "label_smoothing": SHARE,
    "warmup_share": SHARE,
    "max_grad_norm": (*NO_NUMBER, 0, -1, -math.inf),
    "seed": (*NO_INTEGER, -1, 1 << 32, HUGE),
    "drop_rest": NO_FLAG,
    "loss": NO_WORD,
    "mixup": FACTOR,
    "decay_after_warmup": NO_FLAG,
    "halt_threshold_range": RANGE,
}
# Of these AdaTape has the ponder weight alone, so that every value of the others is refused.
HALTING = {
    "act_epsilon": (*EPSILON, 0.5),
    "act_level": (*NO_WORD, "row"),
    "leave": (*NO_WORD, "row"),
    "distinct_layers": (*NO_INTEGER, -1, 1),
    "gate_scale": (*FINITE, 1.0),
    "gate_center": (*FINITE, 1.0),
    "ponder_weight": FACTOR,
    "distribution_weight": (*FACTOR, 1.0),
}
REGULARISATION = {
    "recipe": (*NO_WORD, "small"),
    "loss": NO_WORD,
    "label_smoothing": SHARE,
    "mixup": FACTOR,
    "randaugment": (*NO_INTEGER, -1, 16, HUGE),
    "randaugment_magnitude": (*COUNT, 30),
    "random_erasing": SHARE,
    "ema": PROBABILITY,
    "max_grad_norm": FACTOR,
    "warmup_share": SHARE,
}
OPTIONAL = {"variant", "batch", "limit", "split_seed", "source", "recipe", *HALTING}
OPTIONAL |= {"halt_threshold_range", "init"}
TRAINING = {
    "data": NO_WORD,
    "model_name": (*NO_WORD, "transformer_tiny", "vit_tiny_patch8_224"),
    **HALTING,
    "image_size": COUNT,
    "variant": (*NO_WORD[1:], 0, False, [], "Ti/0", "Ti/٣", "Ti/" + 5000 * "9", "Ti/4.0"),
    "patch": COUNT,
    "bank_patch": COUNT,
    "dim": COUNT,
    "depth": COUNT,
    "heads": COUNT,
    "ffn": COUNT,
    "num_tape_tokens": WIDTH,
    "topk": COUNT,
    "halt_threshold": POSITIVE,
    "epochs": COUNT,
    "batch": (*NO_INTEGER, 0, -1),
    "lr": POSITIVE,
    "weight_decay": FACTOR,
    "dtype": NO_WORD,
    "seed": (*NO_INTEGER, -1, 1 << 32, HUGE),
    "limit": (*NO_INTEGER, 0, -1, -HUGE),
    "drop_rest": NO_FLAG,
    "activation": NO_WORD,
    "bank": NO_WORD,
    "bank_size": COUNT,
    "split_seed": (*NO_INTEGER, -1, 1 << 32, HUGE),
    "source": NO_WORD,
    "init": NO_WORD,
    "draws": NO_WORD,
    "unreadable": NO_WORD,
    "unreadable_limit": (*NO_INTEGER, -1),
    "halt_threshold_range": RANGE,
    **REGULARISATION,
}

SIZES = {"num_classes": 10, "dim": 24, "depth": 1, "num_heads": 2, "ffn_dim": 32}
TABLES = {
    AdaTapeConfig: (MODEL, SIZES),
    AdaTapeViTConfig: (IMAGES, {**SIZES, "image_size": 16, "patch_size": 8, "bank_patch_size": 4}),
    AdaTapeParityConfig: ({**SEQUENCES, "sequence_token": NO_FLAG}, SIZES),
    EncoderConfig: (ENCODER, SIZES),
    ViTConfig: ({**ENCODER, **PIXELS}, {**SIZES, "image_size": 16, "patch_size": 8}),
    TransformerConfig: ({**ENCODER, **ELEMENTS}, SIZES),
    UViTConfig: (
        {**ENCODER, **PIXELS, **UNIVERSAL},
        {**SIZES, "image_size": 16, "patch_size": 8},
    ),
    UniversalTransformerConfig: ({**ENCODER, **ELEMENTS, **UNIVERSAL}, SIZES),
    AViTConfig: ({**ENCODER, **PIXELS, **AVIT}, {**SIZES, "image_size": 16, "patch_size": 8}),
    TrainPlan: (PLAN, {"epochs": 1, "batch": 8, "learning_rate": 1e-3}),
}
CASES = [(kind, name) for kind, (table, _) in TABLES.items() for name in table]
SHOWN = {"learning_rate": "lr", "weight_decay": "weight-decay", "model_name": "model"}
# Where sizes are too large together, the line names all that could be smaller.
TOGETHER = {"dim", "depth", "ffn_dim", "bank_size", "tape_mlp_dim", "image_size", "patch_size"}
TOGETHER |= {"seq_len", "element_dim", "num_registers"}


@pytest.mark.parametrize("kind", [*TABLES, TrainConfig])
def test_every_field_has_an_entry(kind):
    table = TRAINING if kind is TrainConfig else TABLES[kind][0]
    assert {field.name for field in dataclasses.fields(kind)} == table.keys()


def expect_one_line(make, name):
    with pytest.raises((ValueError, TypeError)) as info:
        make()
    message = str(info.value)
    assert "\n" not in message and len(message) < 300, message
    match = re.match(r"([\w, -]+): expected .*, got ", message)
    assert match, message
    named = {part.replace("-", "_") for part in match[1].split(", ")}
    assert name in named or (name in TOGETHER and named <= TOGETHER), message


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_field_refuses_what_it_cannot_be(kind, name):
    table, good = TABLES[kind]
    for value in table[name]:
        given = {**good, name: value}
        expect_one_line(lambda g=given: kind(**g), SHOWN.get(name, name).replace("-", "_"))


@pytest.mark.parametrize("data", ["digits", "imagefolder"])
@pytest.mark.parametrize("name", TRAINING)
def test_an_option_of_training_refuses_what_it_cannot_be(name, data):
    whole = dataclasses.asdict(TrainConfig.of({"data": data}))
    shown = SHOWN.get(name, name).replace("-", "_")
    for value in TRAINING[name]:
        if value is not None:
            expect_one_line(lambda v=value: TrainConfig.of({"data": data, name: v}), shown)
        if value is not None or name not in OPTIONAL:
            # A configuration that was read from a file has all fields, and null for some.
            expect_one_line(lambda v=value: TrainConfig(**{**whole, name: v}).check(), shown)


@pytest.mark.parametrize(
    ("kind", "name", "value", "kept"),
    [
        (AdaTapeConfig, "dim", np.int8(24), 24),
        (AdaTapeConfig, "read_layers", [np.int64(0)], (0,)),
        (AdaTapeConfig, "dropout", np.float32(0.5), 0.5),
        (AdaTapeConfig, "ponder_weight", 1, 1.0),
        (AdaTapeViTConfig, "image_size", np.int16(32), 32),
        (AdaTapeParityConfig, "seq_len", np.int32(20), 20),
        (TrainPlan, "epochs", np.int64(2), 2),
        (TrainPlan, "learning_rate", Fraction(1, 2), 0.5),
    ],
)
def test_numbers_of_other_types_become_python_s(kind, name, value, kept):
    found = getattr(kind(**{**TABLES[kind][1], name: value}), name)
    assert found == kept and type(found) is type(kept)
    assert hash(kind(**{**TABLES[kind][1], name: value}))


class Rows(AdaTape):
    def embed(self, inputs):
        return self.with_class_token(inputs), inputs


@pytest.mark.parametrize("model", [Rows, AdaTapeViT, AdaTapeParity])
@pytest.mark.parametrize("value", [None, {}, SIZES, 3, AdaTapeConfig])
def test_a_model_wants_its_configuration(model, value):
    expect_one_line(lambda: model(value), "config")


def test_a_configuration_of_another_model_is_refused():
    parity, vit = AdaTapeParityConfig(**SIZES), TABLES[AdaTapeViTConfig][1]
    expect_one_line(lambda: AdaTapeViT(parity), "config")
    expect_one_line(lambda: AdaTapeParity(AdaTapeViTConfig(**vit)), "config")


@pytest.mark.parametrize("value", [None, 3, nn.Linear(2, 2), AdaTapeConfig(**SIZES)])
def test_the_padded_model_wants_an_elastic_one(value):
    expect_one_line(lambda: PaddedAdaTape(value), "model")


@pytest.mark.parametrize("value", [None, 3, "photo.png", np.zeros((2, 3, 16, 16))])
def test_inputs_are_a_tensor(value):
    vit = AdaTapeViT(AdaTapeViTConfig(**TABLES[AdaTapeViTConfig][1]))
    for model in (vit, AdaTapeParity(AdaTapeParityConfig(**SIZES)), vit.padded()):
        expect_one_line(lambda m=model: m(value), "inputs")


def test_label_smoothing_is_a_share():
    model = AdaTapeViT(AdaTapeViTConfig(**TABLES[AdaTapeViTConfig][1]))
    output, labels = model(torch.zeros(1, 3, 16, 16)), torch.tensor([1])
    for value in SHARE:
        expect_one_line(
            lambda v=value: model.loss(output, labels, label_smoothing=v), "label_smoothing"
        )


@pytest.mark.parametrize("name", MODEL)
def test_the_factory_refuses_it_too(name):
    for value in MODEL[name]:
        options = {"image_size": 32, **SIZES, name: value}
        expect_one_line(lambda o=options: adatape_vit("Ti/4", **o), name)


@pytest.mark.parametrize("value", [None, 4, "", "Ti", "Ti/٣", "Ti/" + 5000 * "9", "Ti/1e3", b"S/4"])
def test_variants_are_words(value):
    expect_one_line(lambda: adatape_vit(value), "variant")
