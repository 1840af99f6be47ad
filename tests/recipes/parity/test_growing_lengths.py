"""The curriculum of parity: sequences grow as they are solved, and at the latest by a share."""

import dataclasses

import pytest

from adatape_kernels.recipes.parity import parity_training
from adatape_kernels.recipes.parity.growing_lengths import GrowingLengths
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run

CONFIG = ParityConfig(lengths=(2,), eval_examples=20)


def lengths_of(growing, steps, right):
    """The lengths of the steps of a model that is right so often."""
    found = []
    for step in range(steps):
        found.append(growing.at(step))
        growing.learn(right)
    return found


@pytest.mark.parametrize("length", [9, 16, 33, 64])
def test_a_model_that_learns_nothing_gets_the_whole_length_by_its_share(length):
    found = lengths_of(GrowingLengths(length, 50), 60, right=0.94)
    assert found == [8] * 50 + [length] * 10


def test_what_is_solved_grows_at_once():
    quick = lengths_of(GrowingLengths(64, 1000), 400, right=1.0)
    # Every length is asked for 14 times: 1 - 0.2 · 0.9^n > 0.95 from n = 14 on.
    assert quick[:30] == [8] * 14 + [10] * 14 + [12] * 2
    assert quick[-1] == 64 and sorted(set(quick)) == [8, 10, 12, 16, 20, 24, 30, 38, 48, 60, 64]
    odd = lengths_of(GrowingLengths(9, 1000), 40, right=1.0)
    assert odd == [8] * 14 + [9] * 26


def test_what_is_lost_shrinks_and_grows_again_once_it_is_found():
    growing = GrowingLengths(16, 1000)
    lengths_of(growing, 60, right=1.0)
    assert growing.at(60) == 16
    # A guess is right half of the time. The mean is 0.97 by 18 steps of length 16, and below 0.6
    # from n = 15 on, as 0.5 + 0.47 · 0.9^n says; at each other length from n = 11 on, from 0.8.
    lost = lengths_of(growing, 70, right=0.5)
    assert lost == [16] * 15 + [12] * 11 + [10] * 11 + [8] * 33
    assert lengths_of(growing, 100, right=1.0)[-1] == 16


def test_a_model_that_is_often_right_is_left_at_its_length():
    growing = GrowingLengths(16, 1000)
    lengths_of(growing, 20, right=1.0)
    assert lengths_of(growing, 100, right=0.65) == [10] * 100


@pytest.mark.parametrize("length, growing", [(8, 100), (1, 100), (64, 0)])
def test_no_growth(length, growing):
    assert set(lengths_of(GrowingLengths(length, growing), 20, right=0.0)) == {length}


def lengths_trained(monkeypatch, config, run):
    """The lengths and the most symbols that are not 0 of each step, and the model."""
    seen = []
    real = parity_training._training_sequences

    def noted(*arguments):
        sequences = real(*arguments)
        seen.append((sequences.symbols.shape[1], int((sequences.symbols != 0).sum(1).max())))
        return sequences

    monkeypatch.setattr(parity_training, "_training_sequences", noted)
    model, _ = parity_training.train(run, config, lambda *step: None)
    return seen, model


@pytest.mark.parametrize("name", ["adatape", "transformer", "universal"])
def test_every_model_is_trained_on_short_sequences_first(monkeypatch, name):
    config = dataclasses.replace(CONFIG, steps=12, curriculum=0.5, batch=4)
    seen, _ = lengths_trained(monkeypatch, config, Run(name, 16, 0))
    lengths = [length for length, _ in seen]
    assert set(lengths[:6]) <= {4, 6, 8} and lengths[6:] == [16] * 6


@pytest.mark.parametrize(
    "length, protocol, curriculum, expected",
    [
        (16, "uniform", None, (0, True)),
        (32, "uniform", None, (0, True)),
        (33, "uniform", None, (0.5, False)),
        (64, "uniform", None, (0.5, False)),
        (64, "uniform", 0.0, (0, True)),
        (16, "uniform", 0.25, (0.25, False)),
        (16, "extrapolate", None, (0.5, False)),
        (16, "extrapolate", 0, (0, False)),
    ],
)
def test_the_length_decides_growth_and_the_sequence_token(length, protocol, curriculum, expected):
    config = ParityConfig(curriculum=curriculum, protocol=protocol)
    assert (config.growing_share(length), config.has_sequence_token(length)) == expected
    for token in (True, False):
        given = dataclasses.replace(config, sequence_token=token)
        assert given.has_sequence_token(length) is token
    training = config.training(length)
    assert (training["curriculum"], training["sequence_token"]) == expected


@pytest.mark.parametrize("token", [True, False])
def test_the_sequence_token_is_as_the_options_say(monkeypatch, token):
    config = dataclasses.replace(CONFIG, steps=1, curriculum=0.5, batch=4, sequence_token=token)
    _, model = lengths_trained(monkeypatch, config, Run("adatape", 16, 0))
    assert (model.sequence_embed is not None) == token


def test_extrapolation_trains_with_few_zeros_too_but_never_on_more_symbols(monkeypatch):
    """Half of the whole length at most, in sequences down to those that have no 0 at all."""
    config = dataclasses.replace(CONFIG, steps=40, batch=16, protocol="extrapolate", curriculum=0)
    seen, _ = lengths_trained(monkeypatch, config, Run("transformer", 20, 0))
    assert {length for length, _ in seen} == {10, 12, 14, 16, 18, 20}
    assert max(symbols for _, symbols in seen) == 10
    assert any(length == symbols == 10 for length, symbols in seen)


@pytest.mark.parametrize("length, expected", [(9, {4, 6, 8, 9}), (2, {2}), (3, {2, 3})])
def test_extrapolation_trains_on_the_whole_length_where_it_is_odd_too(
    monkeypatch, length, expected
):
    config = dataclasses.replace(CONFIG, steps=40, batch=2, protocol="extrapolate", curriculum=0)
    seen, _ = lengths_trained(monkeypatch, config, Run("transformer", length, 0))
    assert {each for each, _ in seen} == expected


def test_sequence_token_must_be_a_flag():
    with pytest.raises(ValueError, match=r"^sequence-token: expected True or False, got 1$"):
        ParityConfig(sequence_token=1)
