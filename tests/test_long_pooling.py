"""Pooling over many rows is about as exact as torch's sum, and an example's bits are its own."""

import pytest
import torch
from checks import assert_same_bits

from adatape_kernels import ElasticBatch

OP = None


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("rows", [197, 4096])
def test_error_does_not_grow_with_the_number_of_rows(device, kind, rows):
    """Were they added up one after the other, it would be 4 and 20 times that of torch's sum."""
    data = 1 + torch.rand(1, rows, 64, device=device)
    exact, plain = (getattr(torch, kind)(x, 1) for x in (data.double(), data))
    pooled = ElasticBatch.from_padded(data).pool(kind)
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (pooled, plain))
    assert error <= 2 * allowed, (error, allowed)


def test_bits_do_not_depend_on_the_rest_of_the_batch(device):
    input_lens, tape_lens = [0, 70, 33, 0, 300], [5, 0, 40, 0, 16]
    examples = [
        torch.randn(sum(lens), 8, device=device) for lens in zip(input_lens, tape_lens, strict=True)
    ]
    data = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    lens = [torch.tensor(each, device=device) for each in (input_lens, tape_lens)]
    batch = packed(data, *lens)
    for i in range(5):
        alone = packed(data[i : i + 1], *(each[i : i + 1] for each in lens))
        if device == "cpu":  # a GPU adds rows up in any order
            assert_same_bits(alone.pool("mean")[0], batch.pool("mean")[i])
        torch.testing.assert_close(alone.pool("mean")[0], batch.pool("mean")[i])


def packed(padded, input_lens, tape_lens):
    """The rows of each example, whose first ones are its input rows."""
    place = torch.arange(padded.shape[1], device=padded.device)
    mask = place < (input_lens + tape_lens).unsqueeze(1)
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return ElasticBatch.from_packed(padded[mask], ends, tape_lens)
