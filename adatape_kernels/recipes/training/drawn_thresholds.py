"""Halting thresholds that are drawn anew for each step of training.

A model that has met many thresholds in training can be run at any of them. All images of a step
share one threshold, which a call of the model takes as it is; over the steps of an epoch the
thresholds cover the whole range.
"""

import math
from typing import Any

import numpy as np
import torch

from adatape_kernels.arguments import shown
from adatape_kernels.models.value_checks import as_integer, as_number

ThresholdRange = tuple[float, float]
"""The lowest and the highest halting threshold of a uniform distribution."""

# Draws of thresholds take nothing from the numbers that order and augmentation are made of, so that
# a run with a range sees the same images in the same order as a run without.
_STREAM = 1


def as_threshold_range(name: str, value: object) -> ThresholdRange:
    """Return a range as a pair of floats; raise ValueError unless it is two, in ascending order."""
    expected = "two finite numbers, the lower one first"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    low, high = (as_number(name, number) for number in value)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return low, high


def check_nominal(name: str, nominal: float, limits: ThresholdRange) -> None:
    """Raise ValueError where the threshold of evaluation is none that training draws."""
    low, high = limits
    if not low <= nominal <= high:
        raise ValueError(
            f"{name}: expected {low:g} to {high:g}, the range that training draws from, "
            f"got {shown(nominal)}"
        )


def limits_of_steps(
    limits: ThresholdRange | None, seed: int, epoch: int, steps: int
) -> list[dict[str, Any]]:
    """Return what the model is called with beside its images, for each step of an epoch.

    Args:
        limits: the range; None for the model's own threshold in every step.
        seed: the run's seed, which with the number of the epoch decides the thresholds.
        epoch: number of the epoch, from 0 on.
        steps: number of steps in the epoch.
    """
    if limits is None:
        return [{} for _ in range(steps)]
    state = np.random.SeedSequence(
        [as_integer("seed", seed, 0), as_integer("epoch", epoch, 0), _STREAM]
    ).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    low, high = limits
    shares = torch.rand(steps, generator=generator, dtype=torch.float64)
    return [{"halt_threshold": low + (high - low) * share} for share in shares.tolist()]
