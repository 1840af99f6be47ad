"""The halting probabilities and scores of every step of a model, which its output leaves out."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adatape_kernels.halting import HaltingState
from adatape_kernels.halting.step_recording import listening


class HaltingRecord:
    """What `recording` heard of one call of a model."""

    def __init__(self) -> None:
        self._probabilities: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._initial: HaltingState | None = None

    def scores(self) -> Tensor:
        """Return p, (steps, batch) or (steps, batch, most rows); 0 of what had halted before."""
        return self._stacked(self._probabilities)

    def sums(self) -> Tensor:
        """Return h after each step, of the same shape; 1 of what has halted."""
        return self._stacked(self._scores)

    def _stacked(self, steps: list[Tensor]) -> Tensor:
        state = self._initial
        assert state is not None
        if not state.of_rows:
            return torch.stack(steps)
        batch = state.initial
        parts = (batch.with_data(step.unsqueeze(1)).to_padded(batch.max_rows)[0] for step in steps)
        return torch.stack([part.squeeze(2) for part in parts])

    def _add_probabilities(self, module: nn.Module, given: Any, probabilities: Tensor) -> None:
        (state,) = given
        running = state.of_units(state.all_running)
        p = probabilities.to(state.total.dtype).where(running, 0)
        # The record has an entry for each unit that the loop began with; some have left the batch.
        nobody = torch.zeros_like(state.all_scores)
        everyone = dataclasses.replace(state, all_scores=nobody).with_units(
            score=p,
            remainders=state.of_units(state.all_remainders),
            updates=state.of_units(state.all_updates),
            running=running,
        )
        self._probabilities.append(everyone.score)

    def _add_scores(self, state: HaltingState) -> None:
        if not state.rows_per_step:
            self._initial = state
        else:
            self._scores.append(state.score)


@contextmanager
def recording(unit: nn.Module) -> Iterator[HaltingRecord]:
    """Record what a halting unit says while a model is called once on this thread.

    Args:
        unit: the encoder's, called once a step with the state before it.
    """
    record = HaltingRecord()
    hook = unit.register_forward_hook(record._add_probabilities)
    try:
        with listening(record._add_scores):
            yield record
    finally:
        hook.remove()
