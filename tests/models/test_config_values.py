"""Every value of a configuration is checked where the configuration is made."""

import dataclasses
import math
import re

import numpy as np
import pytest
from checks import refused

from adatape_kernels.cli import main
from adatape_kernels.models import AdaTapeConfig, AdaTapeViTConfig, adatape_vit
from adatape_kernels.models.parity import AdaTapeParityConfig
from adatape_kernels.recipes.training.train_plan import TrainPlan

GOOD = {"num_classes": 10, "dim": 24, "depth": 3, "num_heads": 2, "ffn_dim": 32}
POSITIVE = ("num_classes", "dim", "depth", "num_heads", "ffn_dim", "topk", "key_split", "bank_size")
NOT_NEGATIVE = ("tape_ffn_dim", "num_tape_tokens", "tape_mlp_dim", "num_registers")
NOT_NEGATIVE += ("representation_size",)
NUMBERS = ("halt_threshold", "query_noise", "ponder_weight", "dropout", "attention_dropout")
NUMBERS += ("stochastic_depth", "bank_dropout", "norm_eps")
SHARES = ("dropout", "attention_dropout", "stochastic_depth", "bank_dropout")


def test_no_field_is_forgotten():
    others = {"bank", "average_query", "loss_type", "query", "read_layers", "pooling"}
    others |= {"activation", "norm_after_pooling", "class_token"}
    names = {field.name for field in dataclasses.fields(AdaTapeConfig)}
    assert names == others | {*POSITIVE, *NOT_NEGATIVE, *NUMBERS}


BAD = [
    *((name, value) for name in POSITIVE for value in (0, -1, 1.0, True, "3", None, math.nan)),
    *((name, value) for name in NOT_NEGATIVE for value in (-1, 1.0, False, "3", None)),
    *((name, value) for name in NUMBERS for value in (math.nan, "1", None, True)),
    *((name, value) for name in SHARES for value in (-0.1, 1.0, 2, math.inf)),
    *((name, value) for name in ("query_noise", "ponder_weight") for value in (-1, math.inf)),
    ("topk", 33),
    ("num_heads", 5),
    ("key_split", 25),
    ("bank_size", 1 << 31),
    ("num_tape_tokens", 1 << 40),
    ("loss_type", "foo"),
    ("loss_type", None),
    ("bank", "both"),
    ("pooling", "median"),
    ("query", "mean"),
    ("average_query", 1),
    ("read_layers", (3,)),
    ("read_layers", (-1,)),
    ("read_layers", (0, 0)),
    ("read_layers", (0.0,)),
    ("read_layers", 0),
    ("read_layers", None),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_wrong_value_is_refused_by_name(name, value):
    with refused(name):
        AdaTapeConfig(**{**GOOD, name: value})


@pytest.mark.parametrize(("name", "value"), BAD)
def test_the_factory_refuses_it_too(name, value):
    options = {**GOOD, "image_size": 32, name: value}
    with refused(name):
        adatape_vit("Ti/4", **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tape_tokens", 0),
        ("halt_threshold", math.inf),
        ("halt_threshold", 3),
        ("topk", 32),
        ("read_layers", ()),
        ("read_layers", (2, 0)),
        ("dropout", 0),
        ("dim", np.int64(24)),
        ("query_noise", np.float32(0.5)),
        ("loss_type", "max"),
    ],
)
def test_the_ends_of_the_ranges_are_inside(name, value):
    assert getattr(AdaTapeConfig(**{**GOOD, name: value}), name) == value


def test_sizes_that_no_machine_holds():
    with refused("dim, depth, ffn_dim", "2**36"):
        AdaTapeConfig(**{**GOOD, "depth": 10**9})
    with refused("topk", "got 5"):
        AdaTapeConfig(**GOOD, bank="learn", bank_size=4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 400_000}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 32.0}, "image_size"),
        ({"image_size": 8192, "patch_size": 1}, "patch_size"),
        ({"image_size": 8192, "bank_patch_size": 4}, "bank_patch_size"),
        ({"image_size": 32, "patch_size": 0}, "patch_size"),
        ({"image_size": 32, "patch_size": True}, "patch_size"),
        ({"image_size": 32, "bank_patch_size": 5}, "bank_patch_size"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": 3.0}, "in_channels"),
        ({"in_channels": 1 << 30}, "in_channels"),
        ({"image_size": 32, "topk": 17}, "topk"),
    ],
)
def test_sizes_of_images(options, name):
    with refused(name):
        AdaTapeViTConfig(**GOOD, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 40.0}, "seq_len"),
        ({"seq_len": 1 << 40}, "seq_len"),
        ({"element_dim": -3}, "element_dim"),
        ({"seq_len": 4}, "topk"),
        ({"topk": 33}, "topk"),
    ],
)
def test_sizes_of_sequences(options, name):
    with refused(name):
        AdaTapeParityConfig(**GOOD, **options)


@pytest.mark.parametrize("name", ["Ti", "Ti/0", "Ti/-4", "X/16", "", "Ti/4.0", 4, None])
def test_variants(name):
    with refused("variant"):
        adatape_vit(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 1.5),
        ("epochs", True),
        ("batch", "8"),
        ("learning_rate", None),
        ("weight_decay", math.nan),
        ("label_smoothing", 1.1),
        ("warmup_share", -0.1),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", 0),
        ("seed", 0.5),
    ],
)
def test_plans_of_training(name, value):
    shown = {"learning_rate": "lr", "weight_decay": "weight-decay"}.get(name, name)
    with refused(shown):
        TrainPlan(**{"epochs": 1, "batch": 8, "learning_rate": 1e-3, name: value})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--topk", "33"], "topk: expected 1 to 32, got 33"),
        (["--topk", "0"], "topk: expected 1 or more"),
        (["--num-tape-tokens", "-1"], "num-tape-tokens: expected 0 or more"),
        (["--num-tape-tokens", "9999999"], "num-tape-tokens: expected"),
        (["--halt-threshold", "nan"], "halt-threshold: expected a number above 0"),
        (["--dim", "3000000000"], "dim, depth, ffn: expected"),
        (["--depth", "1000000000"], "dim, depth, ffn: expected"),
        (["--variant", "Ti/0"], "variant: expected"),
        (["--weight-decay", "inf"], "weight-decay: expected"),
    ],
)
def test_a_wrong_option_leaves_no_folder_and_needs_no_images(tmp_path, capsys, more, words):
    run = ["train", "--data", "mnist", "--data-dir", str(tmp_path / "absent")]
    assert main([*run, "--out", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_an_absurd_size_of_images_is_one_line(tmp_path, capsys):
    run = ["train", "--data", "imagefolder", "--data-dir", str(tmp_path)]
    assert main([*run, "--out", str(tmp_path / "run"), "--image-size", "400000"]) == 2
    error = capsys.readouterr().err
    assert re.match(r"adatape-kernels: image.size: expected .*, got 400000\n$", error), error
    assert not (tmp_path / "run").exists()
