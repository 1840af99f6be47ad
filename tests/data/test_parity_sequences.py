"""Sequences of the parity task: labels by a literal count, and what each kind draws."""

import pytest
import torch

from adatape_kernels.data.parity_sequences import (
    ParitySequences,
    sparse_sequences,
    uniform_sequences,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: uniform_sequences(50, 7, g),
        lambda g: sparse_sequences(50, 7, (1, 7), g),
    ],
    ids=["uniform", "sparse"],
)
def test_labels_are_counted_and_a_seed_repeats(draw):
    sequences = draw(generator())
    for symbols, label in zip(sequences.symbols.tolist(), sequences.labels.tolist(), strict=True):
        assert set(symbols) <= {-1, 0, 1} and len(symbols) == 7
        assert label == sum(symbol == 1 for symbol in symbols) % 2
    again, other = draw(generator()), draw(generator(1))
    assert torch.equal(again.symbols, sequences.symbols)
    assert not torch.equal(other.symbols, sequences.symbols)


def test_one_hot_features_stand_in_the_order_of_the_symbols():
    sequences = ParitySequences(torch.tensor([[1, 0, -1]]), torch.tensor([1]))
    assert sequences.one_hot().tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 1]]]


def test_uniform_symbols_are_equally_likely():
    symbols = uniform_sequences(1000, 30, generator()).symbols
    for symbol in (-1, 0, 1):
        assert abs((symbols == symbol).double().mean().item() - 1 / 3) < 0.01


def test_sparse_sequences_have_as_many_symbols_as_asked_at_all_places():
    symbols = sparse_sequences(4000, 10, (2, 4), generator()).symbols
    counts = (symbols != 0).sum(1)
    assert set(counts.tolist()) == {2, 3, 4}
    for place in (symbols != 0).double().mean(0).tolist():
        assert abs(place - 0.3) < 0.04
