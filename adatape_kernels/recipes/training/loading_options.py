"""The options of `train` that say how images are read, whether or not they decide the curve."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adatape_kernels.data.loading.guarded_workers import MOST_WORKERS
from adatape_kernels.models.value_checks import as_choice, as_integer
from adatape_kernels.recipes.training.chosen_values import chosen_values

LOADING_OPTIONS = ("draws", "unreadable", "unreadable_limit")
"""The fields of LoadingOptions."""
DRAWS = ("epoch", "image")
UNREADABLE = ("stop", "skip")
LOOKS = ("all", "test", "none")
SETS_OF_FILES = ("imagefolder", "shards")
"""The image sets whose images are decoded when a batch needs them."""
_MOST_UNREADABLE = 1 << 32


@dataclass(frozen=True)
class LoadingOptions:
    """How images are read, as far as it decides the curve."""

    draws: str
    """What augments and mixes images: one generator for an "epoch", or for each "image", as a
    loader needs. No option sets it: `with_draws` chooses, and a run goes on as it began."""
    unreadable: str
    """What an image file that cannot be read does: stop the run, or skip it."""
    unreadable_limit: int
    """The most images of a half of the set that are skipped."""

    def check_set(self, data: str) -> None:
        """Raise ValueError where images of a set in memory may be skipped."""
        if self.unreadable == "skip" and data not in SETS_OF_FILES:
            raise ValueError(
                f"unreadable: expected stop for {data}, whose files are read whole, got skip"
            )


def check_loading_option(field: str, value: object) -> Any:
    """Return a value of a field of LoadingOptions.

    Raises:
        ValueError: the value is none of the field's.
    """
    name = field.replace("_", "-")
    if field == "unreadable_limit":
        return as_integer(name, value, 0, _MOST_UNREADABLE)
    return as_choice(name, value, DRAWS if field == "draws" else UNREADABLE)


@dataclass(frozen=True)
class Loading:
    """How images are read, as far as a curve does not depend on it.

    Raises:
        ValueError: a value is out of range.
    """

    workers: int = 0
    """Number of processes that prepare batches ahead and decode the images of an evaluation; any
    gives one curve, and 0 is the training process itself."""
    look: str = "all"
    """Images that are decoded once before training: all, test or none."""

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "workers", as_integer("workers", self.workers, 0, MOST_WORKERS))
        as_choice("look", self.look, LOOKS)

    @classmethod
    def of_run(cls, given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> "Loading":
        """Return how the images of a run are read.

        Args:
            given: values by field; absent or None where nothing is asked for.
            saved: what `entries` returned when the run was last computed, among other entries;
                None for a new run.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
        """
        return cls(**chosen_values("loading", cls().entries(), given, saved))

    def entries(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the configuration."""
        return {"workers": self.workers, "look": self.look}

    def check_options(self, options: LoadingOptions) -> None:
        """Raise ValueError where a run's options need another way of reading."""
        if self.workers and options.draws == "epoch":
            raise ValueError(
                "workers: expected 0 for a run that began without --workers, whose batches are "
                f"drawn one after another, got {self.workers}"
            )
        if self.look == "none" and options.unreadable == "skip":
            raise ValueError("look: expected all or test with --unreadable skip, got none")


def with_draws(options: Mapping[str, Any], loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a new run with what its batches are drawn from.

    That is a generator for each image where images are files or workers are asked for, be it none
    of them, and otherwise one for each epoch, as in runs of versions without a loader.
    """
    by_image = options.get("data") in SETS_OF_FILES or loading.get("workers") is not None
    return {"draws": "image" if by_image else "epoch", **options}
