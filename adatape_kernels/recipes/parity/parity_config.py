"""The options of `parity`: which runs there are, and how each is trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from adatape_kernels.models.value_checks import as_choice, as_integer, as_number
from adatape_kernels.recipes.list_options import distinct_integers, distinct_names
from adatape_kernels.recipes.parity.parity_models import MODELS

MOST_LENGTH = 1024
MOST_STEPS = 10_000_000

Protocol = Literal["uniform", "extrapolate"]
"""What is trained and measured on: uniform symbols; or sequences most of whose symbols are 0, up to
half of them 1 or -1 in training and more than half where they are measured."""


class Run(NamedTuple):
    """One model, at one length, from one seed."""

    model: str
    length: int
    seed: int

    @property
    def stem(self) -> str:
        """The part of the names of its files before the dot."""
        return f"{self.model}-{self.length}-{self.seed}"


@dataclass(frozen=True)
class ParityConfig:
    """What decides the table.

    Raises:
        ValueError: a value is out of range; nothing has been written then.
    """

    lengths: tuple[int, ...] = (16, 32, 64)
    """Numbers of symbols of a sequence."""
    models: tuple[str, ...] = ("adatape", "transformer", "universal")
    """Names in `parity_models.MODELS`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides the parameters and the training sequences of a run."""
    steps: int = 2500
    """Number of steps of the optimizer in each run."""
    batch: int = 256
    """Number of sequences in a step, new ones each time."""
    lr: float = 1e-3
    """The highest learning rate."""
    curriculum: float = 0.0
    """Share of the steps in which the sequences grow from length 4 to the whole length."""
    eval_examples: int = 6400
    """Number of fixed sequences that a run is measured on."""
    protocol: Protocol = "uniform"
    """What is trained and measured on."""

    def __post_init__(self) -> None:
        """Check the values before any work."""
        self._set("lengths", distinct_integers("lengths", self.lengths, 1, MOST_LENGTH))
        self._set("seeds", distinct_integers("seeds", self.seeds, 0, (1 << 32) - 1))
        self._set("models", distinct_names("models", self.models, MODELS))
        for name, most in (("steps", MOST_STEPS), ("batch", 1 << 20), ("eval_examples", 1 << 24)):
            option = name.replace("_", "-")
            self._set(name, as_integer(option, getattr(self, name), 1, most))
        self._set("lr", as_number("lr", self.lr))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a number above 0, got {self.lr}")
        self._set("curriculum", as_number("curriculum", self.curriculum))
        if not 0 <= self.curriculum <= 1:
            raise ValueError(f"curriculum: expected 0 to 1, got {self.curriculum}")
        as_choice("protocol", self.protocol, ("uniform", "extrapolate"))
        if self.protocol == "extrapolate":
            if self.curriculum:
                raise ValueError("curriculum: expected 0 with the protocol extrapolate")
            if min(self.lengths) < 2:
                raise ValueError("lengths: expected 2 or more with the protocol extrapolate, got 1")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def runs(self) -> Iterator[Run]:
        """Yield the runs, all of a length before those of the next."""
        for length in self.lengths:
            for model in self.models:
                for seed in self.seeds:
                    yield Run(model, length, seed)

    def training(self) -> dict[str, float | str]:
        """Return what decides a run beside its model, its length and its seed."""
        names = "steps", "batch", "lr", "curriculum", "eval_examples", "protocol"
        return {name: getattr(self, name) for name in names}
