"""Offsets of `ElasticBatch` as int64, which cumsum gives."""

import pytest
import torch
from checks import refused

import adatape_kernels as ak
from adatape_kernels import ElasticBatch

ROWS = torch.arange(12.0).view(6, 2)
HUGE = 1 << 32


def assert_same_layout(batch, expected):
    assert torch.equal(batch.data, expected.data)
    for offsets, wanted in (
        (batch.cu_inputs, expected.cu_inputs),
        (batch.cu_tapes, expected.cu_tapes),
    ):
        assert offsets.dtype == wanted.dtype == torch.int32
        assert torch.equal(offsets, wanted)
    assert (batch.num_input_rows, batch.max_rows) == (expected.num_input_rows, expected.max_rows)


def test_from_offsets():
    cu_inputs, cu_tapes = torch.tensor([0, 2, 3]), torch.tensor([3, 3, 6])
    batch = ElasticBatch.from_offsets(ROWS, cu_inputs, cu_tapes)
    assert_same_layout(batch, ElasticBatch.from_offsets(ROWS, cu_inputs.int(), cu_tapes.int()))


@pytest.mark.parametrize("tape_lens", [None, [1, 2]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_packed(tape_lens, dtype):
    tape_lens = None if tape_lens is None else torch.tensor(tape_lens, dtype=dtype)
    cu_seqlens = torch.tensor([0, 2, 6])
    batch = ElasticBatch.from_packed(ROWS, cu_seqlens, tape_lens)
    assert_same_layout(batch, ElasticBatch.from_packed(ROWS, cu_seqlens.int(), tape_lens))


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("exact", [True, False])
def test_append_tape(again, exact):
    offsets = torch.tensor([0, 2, 3])
    batches = []
    for given in (offsets, offsets.int()):
        batch = ElasticBatch.from_offsets(ROWS, torch.tensor([0, 2, 3]), torch.tensor([3, 3, 6]))
        for _ in range(1 + again):
            tape = torch.ones(3 if exact else 4, 2)
            batch = batch.append_tape(tape, given, max_tapes=2, exact=exact)
        batches.append(batch)
    assert_same_layout(*batches)


def test_a_layer_takes_a_batch_whose_offsets_were_int64():
    layer = ak.layers.ElasticEncoderLayer(dim=2, num_heads=1, ffn_dim=4)
    cu_seqlens = torch.tensor([1, 2, 3]).cumsum(0).sub(1)
    packed = ElasticBatch.from_packed(ROWS[:5], cu_seqlens)
    assert layer(packed).data.shape == (5, 2)


@pytest.mark.parametrize("wrong", [HUGE, HUGE + 6, -HUGE])
def test_what_int32_does_not_hold_is_refused(wrong):
    good = torch.tensor([0, 2, 6])
    bad = torch.tensor([0, wrong, 6])
    with refused("cu_seqlens", f"{wrong}"):
        ElasticBatch.from_packed(ROWS, bad)
    with refused("cu_seqlens", f"{wrong}"):
        ElasticBatch.from_packed(ROWS, torch.tensor([0, 2, wrong]))
    with refused("cu_inputs", f"{wrong}"):
        ElasticBatch.from_offsets(ROWS, bad, torch.tensor([6, 6, 6]))
    with refused("cu_tapes", f"{wrong}"):
        ElasticBatch.from_offsets(ROWS, good, torch.tensor([6, 6, wrong]))
    with refused("offsets", f"{wrong}"):
        batch = ElasticBatch.from_packed(ROWS, good)
        batch.append_tape(ROWS, torch.tensor([0, 1, wrong]), max_tapes=9)
