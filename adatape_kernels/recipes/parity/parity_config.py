"""The options of `parity`: which runs there are, and how each is trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.recipes.parity.parity_models import MODELS
from adatape_kernels.recipes.training.execution import DTYPES
from adatape_kernels.recipes.training.list_options import distinct_integers, distinct_names

MOST_LENGTH = 1024
MOST_STEPS = 10_000_000
_LONGEST_WITHOUT_GROWTH, _GROWING_SHARE = 32, 0.5

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
    """Adatape, transformer, universal, and the ablations adatape-last-read, adatape-fixed-query,
    adatape-one-by-one and adatape-wide-keys."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a run of each model at each length, whose parameters and sequences it decides."""
    steps: int = 2500
    """Number of steps of the optimizer in each run."""
    batch: int = 64
    """Number of sequences in a step, new ones each time."""
    lr: float = 1e-3
    """The highest learning rate."""
    curriculum: float | None = None
    """Share of the steps behind which the sequences, which grow from length 8 as a model learns
    them, have the whole length. None is 0 for uniform symbols up to length 32, and else 0.5."""
    eval_examples: int = 6400
    """Number of fixed sequences that a run is measured on."""
    protocol: Protocol = "uniform"
    """Uniform symbols, or extrapolate: train where at most half as many symbols as the length are
    not 0, measure where more are."""
    sequence_token: bool | None = None
    """Let AdaTape see the sequence as a token beside its tape. None is where all sequences of a run
    have one length: the token of short sequences tells their labels, but not those of longer
    ones."""
    dtype: str = "float32"
    """What products are computed in: float32, or bf16 by autocast; the parameters are float32."""

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
        if self.curriculum is not None:
            self._set("curriculum", as_number("curriculum", self.curriculum))
            if not 0 <= self.curriculum <= 1:
                raise ValueError(f"curriculum: expected 0 to 1, got {self.curriculum}")
        if self.sequence_token is not None:
            self._set("sequence_token", as_flag("sequence-token", self.sequence_token))
            if not any(name.startswith("adatape") for name in self.models):
                raise ValueError(
                    "sequence-token: expected none without an AdaTape among the models, got "
                    f"{self.sequence_token}"
                )
        as_choice("protocol", self.protocol, ("uniform", "extrapolate"))
        as_choice("dtype", self.dtype, DTYPES)
        if self.protocol == "extrapolate" and min(self.lengths) < 2:
            raise ValueError("lengths: expected 2 or more with the protocol extrapolate, got 1")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def runs(self) -> Iterator[Run]:
        """Yield the runs, all of a length before those of the next."""
        for length in self.lengths:
            for model in self.models:
                for seed in self.seeds:
                    yield Run(model, length, seed)

    def growing_share(self, length: int) -> float:
        """Return the share of the steps behind which sequences have the whole length."""
        if self.curriculum is not None:
            return self.curriculum
        simple = self.protocol == "uniform" and length <= _LONGEST_WITHOUT_GROWTH
        return 0.0 if simple else _GROWING_SHARE

    def has_sequence_token(self, length: int) -> bool:
        """Return whether AdaTape sees a sequence as a token beside its tape."""
        if self.sequence_token is not None:
            return self.sequence_token
        return self.protocol == "uniform" and not self.growing_share(length)

    def training(self, length: int) -> dict[str, float | str]:
        """Return what decides a run of a length beside its model and its seed."""
        names = "steps", "batch", "lr", "eval_examples", "protocol", "dtype"
        return {
            **{name: getattr(self, name) for name in names},
            "curriculum": self.growing_share(length),
            "sequence_token": self.has_sequence_token(length),
        }
