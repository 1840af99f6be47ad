"""What came out of the comparison: of each run, of each model over its seeds, and the best."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

Cost = Literal["images_per_second", "flops_per_image"]
"""What accuracy is set against."""
COSTS: tuple[Cost, ...] = ("images_per_second", "flops_per_image")


@dataclass(frozen=True)
class CompareResult:
    """What came out of a run."""

    model: str
    size: int
    """Number of layers, or of steps of a universal model."""
    seed: int
    accuracy: float
    """Share of the test images that are classified right."""
    images_per_second: float
    """By the median time of a pass over the test images."""
    images_per_second_p20_p80: tuple[float, float]
    """By the 80th and the 20th percentile of the times."""
    flops_per_image: float
    """Floating-point operations of the products of a forward pass, of what really ran."""
    parameters: int
    epochs: int
    train_images: int
    """Number of training images in an epoch."""
    seconds: float
    """What training took."""
    train_loss: float
    """Mean of the last epoch."""
    train_accuracy: float
    """Of the last epoch, as it went."""
    mean_rows: float
    """Rows that an image has in all layers together, on average over the test images."""
    mean_tape_tokens: float | None
    """Tape tokens that an image reads, on average; None of a model that reads none."""

    def entries(self) -> dict[str, Any]:
        """Return what report.json holds of it."""
        return {**asdict(self), "images_per_second_p20_p80": [*self.images_per_second_p20_p80]}


class Spread(NamedTuple):
    """A number over the seeds."""

    mean: float
    deviation: float | None
    """The standard deviation; None of a single seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return mean and standard deviation of one or more numbers."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


class Group(NamedTuple):
    """The runs of one model and one size."""

    model: str
    size: int
    results: tuple[CompareResult, ...]

    def spread(self, name: str) -> Spread:
        """Return a number of the results over the seeds."""
        return Spread.of([getattr(result, name) for result in self.results])

    @property
    def is_adatape(self) -> bool:
        """Whether the model reads a tape."""
        return self.results[0].mean_tape_tokens is not None


def grouped(results: Sequence[CompareResult]) -> list[Group]:
    """Return the results of each model and size, in the order of the results."""
    keys = dict.fromkeys((result.model, result.size) for result in results)
    return [
        Group(model, size, tuple(r for r in results if (r.model, r.size) == (model, size)))
        for model, size in keys
    ]


def pareto_front(groups: Sequence[Group], cost: Cost) -> list[Group]:
    """Return the models and sizes that no other one beats, the cheapest first.

    One beats another where its mean accuracy and its mean cost are at least as good, and one of the
    two is better.
    """
    sign = -1 if cost == "images_per_second" else 1

    def point(group: Group) -> tuple[float, float]:
        return sign * group.spread(cost).mean, -group.spread("accuracy").mean

    points = {id(group): point(group) for group in groups}
    front = [
        group
        for group in groups
        if not any(
            other[0] <= own[0] and other[1] <= own[1] and other != own
            for own in [points[id(group)]]
            for other in points.values()
        )
    ]
    return sorted(front, key=lambda group: points[id(group)])


def front_in_words(groups: Sequence[Group], cost: Cost) -> str:
    """Return a sentence that says whether AdaTape is on the Pareto front, and with which sizes."""
    if not any(group.is_adatape for group in groups):
        return "there is no AdaTape among the models"
    sizes: dict[str, list[str]] = {}
    for group in sorted(pareto_front(groups, cost), key=lambda group: group.size):
        if group.is_adatape:
            sizes.setdefault(group.model, []).append(str(group.size))
    if not sizes:
        return "AdaTape is not on the Pareto front"
    parts = [f"{model} of {_listed(own)} layers" for model, own in sizes.items()]
    return f"AdaTape is on the Pareto front: {' and '.join(parts)}".replace(" 1 layers", " 1 layer")


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
