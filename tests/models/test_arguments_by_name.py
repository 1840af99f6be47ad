"""Arguments of batches, models and model files are refused by name; numpy's numbers are numbers."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from checks import refused

import adatape_kernels as ak
from adatape_kernels import ops
from adatape_kernels.data import Preprocessing
from adatape_kernels.offsets import cumulative
from adatape_kernels.recipes.predict import Predictor

pytestmark = pytest.mark.runs_no_op

BATCH = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 4))
NO_TENSOR = (None, 3, "x", [1.0])
NO_SIZE = (None, 2.5, math.nan, math.inf, True, np.True_, 1j, "2", np.array([2]), torch.tensor(2))
ENCODER = ak.layers.ElasticEncoder
IMAGES = {"image_size": 8, "channels": 1, "mean": (0.5,), "std": (0.25,)}


def refuses(name, call, error=ValueError):
    with refused(name, error=error):
        call()


@pytest.fixture(scope="module")
def model():
    return ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=3)


@pytest.mark.parametrize("wrong", NO_TENSOR)
def test_buffers_and_their_offsets(wrong):
    rows, cu = torch.zeros(6, 4), torch.tensor([0, 3, 6])
    calls = {
        "padded": lambda: ak.ElasticBatch.from_padded(wrong),
        "packed": lambda: ak.ElasticBatch.from_packed(wrong, cu),
        "nested": lambda: ak.ElasticBatch.from_nested(wrong),
        "cu_seqlens": lambda: ak.ElasticBatch.from_packed(rows, wrong),
        "cu_tapes": lambda: ak.ElasticBatch.from_offsets(rows, cu, wrong),
        "data": lambda: BATCH.with_data(wrong),
    }
    for name, call in calls.items():
        refuses(name, call, TypeError)
    refuses("data", lambda: ak.ElasticBatch.from_offsets(wrong, cu, cu), TypeError)
    refuses("data", lambda: BATCH.clear_unused(wrong), TypeError)
    if wrong is not None:
        refuses("mask", lambda: ak.ElasticBatch.from_padded(torch.zeros(2, 3, 4), wrong), TypeError)
        refuses("tape_lens", lambda: ak.ElasticBatch.from_packed(rows, cu, wrong), TypeError)


@pytest.mark.parametrize("wrong", NO_SIZE)
def test_what_is_no_size(wrong):
    refuses("multiple", lambda: BATCH.round_rows(wrong), TypeError)
    refuses("start", lambda: cumulative(torch.tensor([1, 2]), wrong), TypeError)
    refuses("dim", lambda: ak.layers.DualFFN(wrong, 8), TypeError)
    refuses("dim", lambda: ak.layers.ElasticAttention(wrong, 1), TypeError)
    q = torch.zeros(3, 1, 2)
    cu = torch.tensor([0, 3])
    refuses("max_q", lambda: ops.varlen_attn(q, q, q, cu, cu, wrong, 3), TypeError)
    refuses("image_size", lambda: Preprocessing(**{**IMAGES, "image_size": wrong}), TypeError)


@pytest.mark.parametrize("wrong", [np.True_, np.array([0.5]), torch.tensor([0.5])])
def test_what_is_no_number(wrong):
    refuses("dropout", lambda: ak.layers.DualFFN(8, 8, dropout=wrong), TypeError)
    refuses("mean", lambda: Preprocessing(**{**IMAGES, "mean": (wrong,)}), TypeError)
    meta = torch.tensor(0.5, device="meta")
    refuses("dropout", lambda: ak.layers.DualFFN(8, 8, dropout=meta), TypeError)


@pytest.mark.parametrize("number", [np.int8, np.uint8, np.int64, np.array, int])
def test_numbers_of_numpy_are_sizes_that_never_overflow(number):
    ffn = ak.layers.DualFFN(number(100), number(120), number(100))
    assert ffn.tape_linear1.weight.shape == (200, 100) and ffn.linear1.weight.shape == (120, 100)
    assert ak.layers.ElasticAttention(number(120), number(2)).in_proj_weight.shape == (360, 120)
    layer = ak.layers.ElasticEncoderLayer(number(120), number(2), number(60))
    assert layer.norm1.weight.shape == (120,)
    reader = ak.layers.TapeReader(
        number(120),
        num_tape_tokens=number(100),
        topk=number(2),
        halt_threshold=2.0,
        bank_size=number(100),
        key_split=number(2),
        tape_mlp_dim=number(100),
    )
    assert reader.tape_mlp[0].weight.shape == (200, 120) and type(reader.topk) is int
    tall = ak.ElasticBatch.from_padded(torch.zeros(2, 300, 4)).round_rows(number(64))
    assert tall.data.shape == (640, 4)
    tape, offsets = torch.zeros(120, 4), torch.tensor([0, 60, 120])
    longer = tall.append_tape(tape, offsets, max_tapes=number(100))
    assert longer.append_tape(tape, offsets, max_tapes=number(100)).max_rows == 500
    if number is not np.array:  # a configuration takes single numbers alone
        config = dataclasses.replace(
            ak.models.AdaTapeViTConfig.of("Ti/4", image_size=8), dim=number(120), num_heads=2
        )
        assert type(config.dim) is int and 3 * config.dim == 360


@pytest.mark.filterwarnings("error")
def test_tape_offsets_of_any_strides_append_without_a_word():
    taped = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 1), tape_lens=torch.tensor([1, 1]))
    offsets = torch.tensor([0, 9, 1, 9, 3, 9])[::2]
    longer = taped.append_tape(torch.tensor([[5.0], [6.0], [7.0]]), offsets, max_tapes=2)
    assert longer.tape_lens.tolist() == [2, 3]
    assert longer.data.flatten().tolist() == [0, 0, 0, 0, 0, 5, 0, 6, 7]


def test_fractions_and_numbers_of_numpy_are_rates():
    for rate in (np.float32(0.5), np.float64(0.5), Fraction(1, 2), torch.tensor(0.5)):
        assert ak.layers.DualFFN(8, 8, dropout=rate).dropout == 0.5


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(2), torch.zeros(2, 3, 4), "relu\n"])
def test_choices_are_refused_in_one_line(wrong):
    refuses("activation", lambda: ak.layers.DualFFN(8, 8, activation=wrong))
    read = {"num_tape_tokens": 2, "topk": 2, "halt_threshold": 1.0, "loss_type": wrong}
    refuses("loss_type", lambda: ops.tape_select(torch.ones(2, 4), torch.ones(9, 4), **read))
    refuses("loss_type", lambda: ak.layers.TapeReader(8, **read))
    refuses("kind", lambda: BATCH.pool(wrong))
    if wrong is not None:
        refuses("use_backend", lambda: ak.use_backend(wrong).__enter__())


def test_layers_of_an_encoder():
    for wrong in (None, 3, [3], "xy", torch.zeros(2), torch.tensor(2)):
        refuses("layers", lambda w=wrong: ENCODER(w, 8), TypeError)
    layers = [ak.layers.ElasticEncoderLayer(8, 2, 8)]
    refuses("readers", lambda: ENCODER(layers, 8, {0: None}), TypeError)


@pytest.mark.parametrize("wrong", [None, "x", 3, (2, 3), torch.tensor(2)])
def test_arguments_of_varlen_attn(wrong):
    q, cu = torch.zeros(3, 1, 2), torch.tensor([0, 3])
    if not isinstance(wrong, torch.Tensor):
        refuses("query", lambda: ops.varlen_attn(wrong, q, q, cu, cu, 3, 3), TypeError)
        refuses("value", lambda: ops.varlen_attn(q, q, wrong, cu, cu, 3, 3), TypeError)
        refuses("cu_seq_q", lambda: ops.varlen_attn(q, q, q, wrong, cu, 3, 3), TypeError)
        refuses("q", lambda: ops.varlen_attention(wrong, q, q, cu), TypeError)
    if wrong is not None:
        refuses(
            "return_aux",
            lambda: ops.varlen_attn(q, q, q, cu, cu, 3, 3, return_aux=wrong),
            TypeError,
        )
    with pytest.raises(NotImplementedError, match="window_size: expected"):
        ops.varlen_attn(q, q, q, cu, cu, 3, 3, window_size=wrong)


def test_labels_of_a_loss(model):
    with ak.use_backend("eager"):
        output = model(torch.zeros(2, 3, 8, 8))
    for wrong in NO_TENSOR:
        refuses("labels", lambda w=wrong: model.loss(output, w), TypeError)
        refuses("output", lambda w=wrong: model.loss(w, torch.tensor([0, 1])), TypeError)
        refuses("output", lambda w=wrong: model.padded().loss(w, torch.tensor([0, 1])), TypeError)
    for labels in ([0], [0, 1, 2], [[0], [1]], [0.0, 1.0], [0, 3], [0, -1], [True, False]):
        refuses("labels", lambda values=labels: model.loss(output, torch.tensor(values)))
    refuses("labels", lambda: model.loss(output, torch.tensor([0, 1], dtype=torch.int32)))
    refuses("label_smoothing", lambda: model.loss(output, torch.tensor([0, 1]), label_smoothing=2))
    likely = torch.nn.functional.one_hot(torch.tensor([0, 2]), 3).float()
    by_number = model.loss(output, torch.tensor([0, 2]))
    torch.testing.assert_close(model.loss(output, likely), by_number)
    half = model.loss(output, torch.tensor([0, -100]), label_smoothing=Fraction(1, 10))
    assert half.isfinite()


def test_arguments_of_save_and_load(model, tmp_path):
    file = ak.save(model, tmp_path / "a.safetensors")
    for wrong in (None, 3, 2.5, b"a", ["a"], torch.zeros(2)):
        refuses("target", lambda w=wrong: ak.save(model, w), TypeError)
        refuses("source", lambda w=wrong: ak.load(w), TypeError)
        refuses("path", lambda w=wrong: ak.scenic.load_file(w), TypeError)
        refuses("path", lambda w=wrong: ak.scenic.read_npz(w), TypeError)
    for wrong in ("", "a\0b"):
        refuses("target", lambda w=wrong: ak.save(model, w))
        refuses("source", lambda w=wrong: ak.load(w))
    for wrong in (3, {"a"}, 2.5, torch.zeros(3)):
        refuses("class_names", lambda w=wrong: ak.save(model, tmp_path, class_names=w), TypeError)
        refuses(
            "preprocessing", lambda w=wrong: ak.save(model, tmp_path, preprocessing=w), TypeError
        )
        refuses("dtype", lambda w=wrong: ak.load(file, dtype=w), TypeError)
        refuses("config", lambda w=wrong: ak.load(file, config=w), TypeError)
        refuses("model", lambda w=wrong: Predictor(w), TypeError)
    refuses("device", lambda: ak.load(file, device=2**63))
    refuses("params", lambda: ak.scenic.load(3, {}), TypeError)
    refuses("config", lambda: ak.scenic.load({}, 3), TypeError)


def test_preprocessing_fits_the_model(model, tmp_path):
    refuses("mean", lambda: Preprocessing(8, 3, (0.0,), (1.0,)))
    refuses("std", lambda: Preprocessing(8, 1, (0.0,), (0.0,)))
    refuses("mean", lambda: Preprocessing(8, 1, (math.nan,), (1.0,)))
    refuses("mean", lambda: Preprocessing(8, 1, (10**400,), (1.0,)))
    refuses("channels", lambda: Preprocessing(8, 2, (0.0, 0.0), (1.0, 1.0)))
    refuses("image_size", lambda: Preprocessing(2**20, 1, (0.0,), (1.0,)))
    assert Preprocessing(np.int64(8), 1, [0], [np.float32(1)]) == Preprocessing(
        8, 1, (0.0,), (1.0,)
    )
    for other in (Preprocessing(8, 1, (0.0,), (1.0,)), Preprocessing(4, 3, (0.0,) * 3, (1.0,) * 3)):
        refuses("preprocessing", lambda p=other: ak.save(model, tmp_path, preprocessing=p))
