"""A run of the parity table: it learns, repeats, and is measured on sequences that are fixed."""

import dataclasses

import pytest
import torch

from adatape_kernels.recipes.parity import parity_training
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.training.train_step import StepSums

CONFIG = ParityConfig(lengths=(2,), steps=60, batch=32, lr=3e-3, eval_examples=300)


def silent(steps, loss, accuracy):
    pass


def without_time(result):
    return dataclasses.replace(result, seconds=0)


def test_a_short_sequence_is_learned_and_a_seed_repeats():
    seen = []
    run = Run("adatape", 2, 0)
    model, result = parity_training.train(run, CONFIG, lambda *step: seen.append(step))
    assert result.accuracy > 0.95
    assert [steps for steps, _, _ in seen] == list(range(1, 61))
    assert seen[-1][2] == result.curve[-1][2] and result.curve[-1][0] == 60
    again = parity_training.train(run, CONFIG, silent)[1]
    assert without_time(again) == without_time(result)
    # What is reported is what the model does on the fixed sequences, from any process.
    accuracy, work = parity_training.measure(model, parity_training.eval_sequences(2, 300))
    assert (accuracy, work) == (result.accuracy, result.work_per_example)


def test_evaluation_is_the_same_for_every_seed_and_differs_from_training():
    sequences = parity_training.eval_sequences(16, 100)
    assert torch.equal(sequences.symbols, parity_training.eval_sequences(16, 100).symbols)
    # A longer evaluation begins with other sequences; no run of another seed changes them.
    torch.manual_seed(5)
    assert torch.equal(sequences.symbols, parity_training.eval_sequences(16, 100).symbols)


def test_a_loss_that_is_not_finite_names_run_and_step(monkeypatch):
    nothing = torch.tensor(0)
    sums = StepSums(torch.tensor(torch.nan), nothing, nothing, "tape_tokens")
    monkeypatch.setattr(parity_training, "add_gradients", lambda *a: sums)
    with pytest.raises(RuntimeError, match=r"loss: expected a finite value in adatape-2-0 at"):
        parity_training.train(Run("adatape", 2, 0), CONFIG, silent)


@pytest.mark.parametrize("model", ["adatape", "universal"])
def test_extrapolation_trains_on_few_symbols_and_measures_many(monkeypatch, model):
    drawn = []
    real = parity_training.sparse_sequences

    def noted(count, length, ones, generator):
        drawn.append((count, ones))
        return real(count, length, ones, generator)

    monkeypatch.setattr(parity_training, "sparse_sequences", noted)
    config = dataclasses.replace(CONFIG, steps=2, protocol="extrapolate")
    result = parity_training.train(Run(model, 9, 0), config, silent)[1]
    assert sorted(set(drawn)) == [(32, (1, 4)), (300, (1, 4)), (300, (5, 9))]
    assert 0 <= result.trained_accuracy <= 1 and 0 <= result.accuracy <= 1
    assert not torch.equal(
        parity_training.eval_sequences(9, 50, "extrapolate").symbols,
        parity_training.eval_sequences(9, 50, "extrapolate", as_trained=True).symbols,
    )
