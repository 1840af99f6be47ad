"""The options of `compare`: which models are trained, on what, and how long all of it may take."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adatape_kernels.arguments import check_kind, shown
from adatape_kernels.models.encoder_config import MOST_LAYERS
from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes.training.list_options import distinct_integers, distinct_names
from adatape_kernels.recipes.training.loading_options import (
    SETS_OF_FILES,
    Loading,
    with_draws,
)
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import MOST_EPOCHS
from adatape_kernels.recipes.training.unused_options import check_loading_used

MODELS: dict[str, dict[str, Any]] = {
    "adatape-input": {"model_name": "adatape", "bank": "input"},
    "adatape-learn": {"model_name": "adatape", "bank": "learn"},
    "vit": {"model_name": "vit"},
    "uvit": {"model_name": "uvit"},
    "u2t": {"model_name": "u2t"},
    "avit": {"model_name": "avit"},
}
"""The models by name, and the options of `train` that make them: what halts leaves the batch."""

SHARED_OPTIONS = (
    *("image_size", "patch", "bank_patch", "dim", "heads", "ffn", "batch", "lr"),
    *("unreadable", "unreadable_limit"),
)
"""Options of `train` that all models share, but for the side of bank patches, which most lack."""

MOST_ROUNDS = 1000
_MOST_SECONDS = 30 * 24 * 3600.0
_UNITS = (3600.0, 60.0, 1.0)
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
# Layers that take turns in a U2T.
_TURNS = 2


class CompareRun(NamedTuple):
    """One model, of one size, from one seed."""

    model: str
    size: int
    """Number of layers, or of steps of a universal model."""
    seed: int

    @property
    def stem(self) -> str:
        """The part of the names of its files before the dot."""
        return f"{self.model}-{self.size}-{self.seed}"


@dataclass(frozen=True)
class CompareConfig:
    """What decides the comparison.

    Raises:
        ValueError: a value is out of range; nothing has been read or written then.
    """

    data: str = "fashion-mnist"
    """The image set: digits, fashion-mnist, mnist, cifar10, imagefolder or shards."""
    models: tuple[str, ...] = tuple(MODELS)
    """Names of models, of which all are compared by default."""
    sizes: tuple[int, ...] = (2, 4, 6)
    """Numbers of layers, of steps of uvit and u2t."""
    seeds: tuple[int, ...] = (0, 1)
    """Each is a run of each model of each size, and decides its parameters and order of images."""
    budget: float | None = None
    """Seconds that all of it may take; None where `epochs` says how long training is."""
    epochs: int | None = None
    """Passes over the training images, in the place of a budget; None where that decides it."""
    limit: int | None = None
    """Most training images that are used; None for all."""
    rounds: int = 5
    """Timed passes over the test images, all models in turn."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values by name of SHARED_OPTIONS, where they are not those of `train`."""

    def __post_init__(self) -> None:
        """Check the values before any work."""
        self._set("sizes", distinct_integers("sizes", self.sizes, 1, MOST_LAYERS))
        self._set("seeds", distinct_integers("seeds", self.seeds, 0, (1 << 32) - 1))
        self._set("models", distinct_names("models", self.models, MODELS))
        self._set("rounds", as_integer("rounds", self.rounds, 1, MOST_ROUNDS))
        if (self.budget is None) == (self.epochs is None):
            came = "neither" if self.budget is None else "both"
            raise ValueError(f"budget: expected a budget or a number of epochs, got {came}")
        if self.budget is not None:
            self._set("budget", as_number("budget", self.budget))
            if not 0 < self.budget <= _MOST_SECONDS:
                raise ValueError(f"budget: expected up to 30 days, got {self.budget} seconds")
        if self.epochs is not None:
            self._set("epochs", as_integer("epochs", self.epochs, 1, MOST_EPOCHS))
        given = {name: value for name, value in self.options.items() if value is not None}
        for name in given:
            if name not in SHARED_OPTIONS:
                raise ValueError(
                    f"options: expected {', '.join(SHARED_OPTIONS)}, got {shown(name)}"
                )
        self._set("options", given)
        if "bank_patch" in given and not any(name.startswith("adatape") for name in self.models):
            raise ValueError(
                f"bank-patch: expected none without an AdaTape among the models, got "
                f"{given['bank_patch']}"
            )
        for run in self.runs():
            self.train_config(run, self.epochs or 1, self.limit)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def runs(self) -> Iterator[CompareRun]:
        """Yield the runs, all of a model before those of the next."""
        for model in self.models:
            for size in self.sizes:
                for seed in self.seeds:
                    yield CompareRun(model, size, seed)

    def loading(self, asked: Mapping[str, Any]) -> Loading:
        """Return how the images of all runs are read.

        Args:
            asked: values by field of Loading; absent or None where nothing is asked for.

        Raises:
            ValueError: a value is out of range, or these images cannot be read so.
        """
        check_kind("loading", asked, Mapping)
        loading = Loading.of_run(asked)
        check_loading_used(asked, self.data)
        if loading.workers and self.data not in SETS_OF_FILES:
            raise ValueError(
                f"workers: expected 0 for {self.data}, whose images are in memory, got "
                f"{loading.workers}"
            )
        loading.check_options(self.train_config(next(self.runs()), 1, self.limit))
        return loading

    def train_config(self, run: CompareRun, epochs: int, limit: int | None) -> TrainConfig:
        """Return how `train` would train a run, on the same images whatever its seed.

        Args:
            run: which one.
            epochs: number of passes over the training images.
            limit: number of training images; None for all.
        """
        made = {**MODELS[run.model], "depth": run.size, "seed": run.seed, "split_seed": 0}
        if run.model == "u2t":
            made["distinct_layers"] = min(_TURNS, run.size)
        shared = {**self.options}
        if made["model_name"] != "adatape":
            shared.pop("bank_patch", None)
        options = {"data": self.data, "epochs": epochs, "limit": limit, **shared, **made}
        # What one model has no use for may be there for another one.
        usual = self.options if "adatape-input" in self.models else {}
        usual = {name: usual[name] for name in usual if name == "bank_patch"}
        return TrainConfig.of(with_draws(options, {}), usual=usual)


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as "90s", "20m" or "1h30m".

    Raises:
        ValueError: it is none, or it is 0.
    """
    found = _TIME.fullmatch(text.strip())
    parts = found.groups(default="0") if found else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, _UNITS, strict=False))
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget: expected a time such as 90s, 20m or 1h30m, got {shown(text)}")
    return seconds


def time_text(seconds: float) -> str:
    """Return a time as people write it, such as 45s, 3m20s or 1h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours}h{minutes:02}m"
