"""`ElasticBatch.keep` and `keep_examples`: which rows stay, and what the new batch says of them."""

import pytest
import torch
from checks import assert_same_bits, refused

from adatape_kernels import ElasticBatch

INPUT_LENS, TAPE_LENS = [3, 0, 4, 1], [1, 2, 0, 0]


def batch_of(unused=0):
    rows = sum(INPUT_LENS) + sum(TAPE_LENS)
    data = torch.randn(rows + unused, 5, requires_grad=True)
    offsets = torch.tensor([[0, *INPUT_LENS], [sum(INPUT_LENS), *TAPE_LENS]]).cumsum(1)
    return ElasticBatch.from_offsets(data, *offsets, exact=unused == 0)


def assert_says_the_truth(batch):
    """A batch made of the same offsets anew says the same of itself."""
    again = ElasticBatch.from_offsets(
        batch.data, batch.cu_inputs, batch.cu_tapes, exact=batch.exact
    )
    for name in ("num_input_rows", "min_inputs", "max_inputs", "max_tapes", "exact"):
        assert getattr(batch, name) == getattr(again, name), name


@pytest.mark.parametrize("unused", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_that_are_kept_stay_with_their_examples(share, unused):
    batch = batch_of(unused)
    mask = torch.rand(len(batch.data)) < share
    kept, source = batch.keep(mask)
    assert_says_the_truth(kept)
    assert kept.exact and len(kept) == 4
    owned = sum(INPUT_LENS) + sum(TAPE_LENS)
    assert source.tolist() == [r for r in range(owned) if mask[r]]
    assert_same_bits(kept.data, batch.data[source])
    parts = zip(batch.with_data(mask.unsqueeze(1)), batch, kept, strict=True)
    for flags, before, after in parts:
        assert_same_bits(after.inputs, before.inputs[flags.inputs[:, 0]])
        assert_same_bits(after.tape, before.tape[flags.tape[:, 0]])
    kept.data.sum().backward()
    expected = torch.zeros_like(batch.data)
    expected[source] = 1
    assert_same_bits(batch.data.grad, expected)


@pytest.mark.parametrize("unused", [0, 2])
@pytest.mark.parametrize("staying", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_examples_that_are_kept_are_the_batch(staying, unused):
    batch = batch_of(unused)
    mask = torch.zeros(4, dtype=torch.bool)
    mask[staying] = True
    kept, source = batch.keep_examples(mask)
    assert_says_the_truth(kept)
    assert len(kept) == len(staying) and kept.exact
    assert_same_bits(kept.data, batch.data[source])
    for example, number in zip(kept, staying, strict=True):
        assert_same_bits(example.inputs, batch[number].inputs)
        assert_same_bits(example.tape, batch[number].tape)
    assert kept.min_inputs == min((INPUT_LENS[i] for i in staying), default=0)


def test_the_number_of_rows_stays_rounded():
    batch = batch_of().round_rows(8)
    for kept, source in (
        batch.keep(torch.ones(16, dtype=torch.bool)),
        batch.keep_examples(torch.tensor([True, False, False, True])),
    ):
        assert len(kept.data) % 8 == 0 and kept.row_multiple == 8 and not kept.exact
        assert len(source) == int(kept.cu_tapes[-1])


def test_an_empty_batch_keeps_nothing():
    empty = batch_of()[:0]
    for kept, source in (
        empty.keep(torch.ones(0, dtype=torch.bool)),
        empty.keep_examples(torch.ones(0, dtype=torch.bool)),
    ):
        assert len(kept) == 0 and len(source) == 0 and kept.data.shape == (0, 5)


@pytest.mark.parametrize("method", ["keep", "keep_examples"])
def test_a_mask_that_fits_nothing_is_refused(method):
    keep, count = getattr(batch_of(), method), 11 if method == "keep" else 4
    with refused("mask", f"({count},)", "(3,)"):
        keep(torch.ones(3, dtype=torch.bool))
    with refused("mask", "bool", "int64"):
        keep(torch.ones(count, dtype=torch.int64))
    with refused("mask", "cpu", "meta"):
        keep(torch.ones(count, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="mask: expected a tensor"):
        keep([True] * count)
