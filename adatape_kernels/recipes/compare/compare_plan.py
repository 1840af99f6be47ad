"""How long the comparison takes, and how much training fits into its budget."""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes.compare.compare_config import CompareConfig, CompareRun, time_text

# Share of the budget that is planned for; starting processes and writing take the rest.
_AIM = 0.95
# Share of the time that measuring may take before fewer rounds than wanted are planned for, down to
# three; and the share that it may take with three, before there are fewer still.
_MOST_MEASURING, _AT_LAST_MEASURING = 0.35, 0.6
_LEAST_ROUNDS = 3
# Whole epochs over all images are chosen where they are between these shares of what fits; else
# images are left out.
_LEAST_USED, _MOST_USED = 0.85, 1.04
# Fewer images than these make no comparison.
_LEAST_IMAGES = 100
COUNTING_PASSES = 1.5
"""The pass that counts FLOPs takes about as long as so many that are timed."""


class RunCost(NamedTuple):
    """What a run of a model and a size takes, in seconds by the image."""

    train: float
    test: float


Costs = Mapping[tuple[str, int], RunCost]
"""Costs by model and size."""


@dataclass(frozen=True)
class ComparePlan:
    """How all runs are trained and measured, and how long that is thought to take."""

    epochs: int
    images: int
    """Number of training images."""
    rounds: int
    batch: int
    """Number of images in a step."""
    training_seconds: float
    measuring_seconds: float
    fitting_epochs: float | None
    """Epochs over all images that the budget has room for; None without a budget."""

    def __post_init__(self) -> None:
        """Check the values, which a file may hold."""
        for name in ("epochs", "images", "rounds", "batch"):
            as_integer(name, getattr(self, name), 1)
        for name in ("training_seconds", "measuring_seconds"):
            if not 0 <= as_number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.fitting_epochs is not None:
            as_number("fitting_epochs", self.fitting_epochs)


def planned(
    config: CompareConfig,
    costs: Costs,
    *,
    images: int,
    test_images: int,
    jobs: int,
    loading: float,
    spent: float,
) -> ComparePlan:
    """Choose epochs, images and rounds.

    Args:
        config: what is compared, and the budget.
        costs: what each model of each size takes.
        images: number of training images that may be used.
        test_images: number of test images.
        jobs: number of runs that are trained at a time.
        loading: seconds that it takes to bring a test image into the form that models take.
        spent: seconds that have passed already.

    Raises:
        ValueError: the budget is too small for any training; the error says which is enough.
    """
    runs = [*config.runs()]
    by_image = makespan((costs[run.model, run.size].train for run in runs), jobs)
    by_pass = test_images * (loading + sum(costs[run.model, run.size].test for run in runs))
    counting = COUNTING_PASSES * by_pass + test_images * loading * len(runs)
    if config.budget is None:
        assert config.epochs is not None
        training = config.epochs * images * by_image
        measuring = config.rounds * by_pass + counting
        return _plan(config, config.epochs, images, config.rounds, training, measuring, None)
    room = _AIM * config.budget - spent
    rounds = int((_MOST_MEASURING * room - counting) / by_pass)
    rounds = min(config.rounds, max(_LEAST_ROUNDS, rounds))
    least = min(images, _LEAST_IMAGES)
    while rounds > 1 and rounds * by_pass + counting > _AT_LAST_MEASURING * room:
        rounds -= 1
    measuring = rounds * by_pass + counting
    fitting = (room - measuring) / by_image / images
    if fitting * images < least:
        enough = math.ceil((spent + measuring + least * by_image) / _AIM)
        raise ValueError(
            f"budget: expected {time_text(enough * 1.1)} or more for {_count(len(runs), 'run')} "
            f"on this machine, got {time_text(config.budget)}"
        )
    epochs, used = int(fitting), images
    if epochs + 1 <= _MOST_USED * fitting:
        epochs += 1
    elif epochs < _LEAST_USED * fitting:
        epochs = math.ceil(fitting)
        used = max(1, min(images, round(images * fitting / epochs)))
    return _plan(config, epochs, used, rounds, epochs * used * by_image, measuring, fitting)


def _plan(
    config: CompareConfig,
    epochs: int,
    images: int,
    rounds: int,
    training: float,
    measuring: float,
    fitting: float | None,
) -> ComparePlan:
    first = next(config.runs())
    batch = config.train_config(first, epochs, None).with_batch_for(images).batch
    assert batch is not None
    return ComparePlan(epochs, images, rounds, min(batch, images), training, measuring, fitting)


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Return how long tasks take, the longest first, each given to whoever is free first."""
    free = [0.0] * jobs
    for each in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def longest_first(runs: Iterable[CompareRun], costs: Costs) -> list[CompareRun]:
    """Return runs in the order in which they are trained, so that none is long in the end."""
    return sorted(runs, key=lambda run: -costs[run.model, run.size].train)


def amount_text(config: CompareConfig, plan: ComparePlan, images: int) -> str:
    """Return the lines that say how much is trained, of so many images."""
    steps = -(-plan.images // plan.batch)
    amount = (
        f"{_count(plan.epochs, 'epoch')} of {_count(plan.images, 'image')} "
        f"({_count(steps, 'step')} of {plan.batch} each) for every model"
    )
    if config.budget is None:
        return amount
    lines = [f"a budget of {time_text(config.budget)}: {amount}"]
    if plan.images < images and plan.fitting_epochs is not None:
        lines.append(
            f"{plan.fitting_epochs:.2g} epochs of all {images:,} images would fit, so that "
            f"{images - plan.images:,} of them are left out"
        )
    if plan.rounds < config.rounds:
        lines.append(f"{_count(plan.rounds, 'round')} of timing fit, instead of {config.rounds}")
    return "\n".join(lines)


def time_split_text(plan: ComparePlan, spent: float) -> str:
    """Return the line that says how long all of it takes, of which some seconds have passed."""
    total = spent + plan.training_seconds + plan.measuring_seconds
    return (
        f"about {time_text(total)} in all: {time_text(spent)} so far, training "
        f"{time_text(plan.training_seconds)}, measuring {time_text(plan.measuring_seconds)} "
        f"({_count(plan.rounds, 'round')})"
    )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name if number == 1 else name + 's'}"
