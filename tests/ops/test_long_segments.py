"""A bank's gradient where many reads are of one entry, whose segment is then summed in parts."""

import pytest
import torch
from checks import assert_close, assert_same_bits

from adatape_kernels import reference

OP = "tape_gather"
pytestmark = pytest.mark.backends("triton", "cuda")
# By entry, how many reads are of it: none, whole parts of 16, and one more or less than these.
LENGTHS = [0, 1, 16, 17, 0, 33, 15, 2]
DIM = 12


def reads(device, lengths=LENGTHS, seed=0):
    """One token an example of one entry, in random order: indices, weights and counts."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    entries = entries[torch.randperm(len(entries), generator=generator)].to(device)
    weights = torch.rand(len(entries), 1, 1, generator=generator).to(device)
    counts = torch.ones(len(entries), dtype=torch.int32, device=device)
    return entries.int().view(-1, 1, 1), weights, counts


def gradient(dtape, indices, weights, counts):
    bank = dtape.new_zeros(len(LENGTHS), DIM)
    return torch.ops.adatape.tape_gather_bwd(dtape, bank, indices, weights, counts)[0]


def test_every_length_is_summed(device):
    given = reads(device)
    dtape = torch.randn(len(given[0]), DIM, device=device)
    actual = gradient(dtape, *given)
    bank = dtape.new_zeros(len(LENGTHS), DIM)
    expected, _ = reference.tape_gather_bwd(dtape.double(), bank.double(), *given)
    assert_close(actual, expected, 1e-5)
    assert_same_bits(actual, gradient(dtape, *given))


def test_one_segment_s_bits_do_not_depend_on_the_others(device):
    """Nor on where the segment begins among all of them."""
    indices, weights, counts = reads(device)
    dtape = torch.randn(len(indices), DIM, device=device)
    expected = gradient(dtape, indices, weights, counts)
    for entry, other in ((5, 0), (3, 7)):
        elsewhere = torch.where(indices == entry, entry, other).int()
        actual = gradient(dtape, elsewhere, weights, counts)
        assert_same_bits(actual[entry], expected[entry])


@pytest.mark.parametrize("number", [16, 17, 70])
def test_one_entry_alone(device, number):
    indices, weights, counts = reads(device, [number])
    dtape = torch.randn(number, DIM, device=device)
    actual = gradient(dtape, indices + 3, weights, counts)
    assert_close(actual[3], (dtape.double() * weights.view(-1, 1).double()).sum(0), 1e-5)
    actual[3] = 0
    assert not actual.any()
