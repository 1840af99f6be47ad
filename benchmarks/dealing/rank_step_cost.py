"""What a rank's training step takes on a GPU, by the rows of its images: by arithmetic alone.

The stages of a forward pass, with their counted work, are those of `reports.imagenet_cost`. Here
each is shared out to what it grows with: images, the rows of the encoder, the squares of their
numbers in attention, or tape tokens.
"""

from dataclasses import dataclass

import numpy as np

from adatape_kernels.benchmarks.audit.cards import CARDS, MEMORY_SHARE, Card
from adatape_kernels.benchmarks.reports.gpu_performance import COUNTED, counted_ops
from adatape_kernels.benchmarks.reports.imagenet_cost import (
    ADAMW_BYTES,
    COUNTED_IMAGES,
    PASSES,
    parameters,
    recipe_config,
    stages,
)

_SQUARES = ("attention",)
_ROWS = (
    "queries, keys, values",
    "attention's product",
    "sum and norm",
    "feed-forward",
    "activation",
    "feed-forward's second",
)
_TAPE = ("gather", "tape's product", "tape's second product")


@dataclass(frozen=True)
class StepCost:
    """The time of a rank's step, as a sum over its images; in seconds, or in any other unit."""

    own_rows: int
    """Rows of an image beside its tape."""
    longest: int
    """Most tape tokens of an image."""
    row: float
    """For each row of an image."""
    square: float = 0.0
    """For the square of an image's number of rows."""
    tape: float = 0.0
    """For each tape token."""
    image: float = 0.0
    """For each image."""
    step: float = 0.0
    """For each step, whatever it computes."""

    def images(self, lengths: np.ndarray) -> np.ndarray:
        """Return what each image costs, (images,), by its tape length."""
        rows = lengths + self.own_rows
        return self.image + self.tape * lengths + self.row * rows + self.square * rows**2


def of_variant(variant: str, card: Card | None = None) -> StepCost:
    """Return the predicted cost of a training step of ImageNet's recipe.

    Left out is what ranks do together: gradients travel while others are computed.

    Args:
        variant: the model's size and patch.
        card: the GPU; None for an H100.
    """
    card = card or next(each for each in CARDS if each.name == "H100")
    _, model = recipe_config(variant)
    own, longest = model.num_patches, model.num_tape_tokens
    rows = own + longest
    spent = dict.fromkeys(("row", "square", "tape", "image"), 0.0)
    for stage in stages(variant, counted_ops(COUNTED)):
        seconds = PASSES * stage.times * card.predicted(stage.ours) / COUNTED_IMAGES
        if stage.name in _SQUARES:
            spent["square"] += seconds / rows**2
        elif stage.name in _ROWS:
            spent["row"] += seconds / rows
        elif stage.name in _TAPE:
            spent["tape"] += seconds / longest
        else:
            spent["image"] += seconds
    updating = ADAMW_BYTES * parameters(variant) / (MEMORY_SHARE * card.memory)
    return StepCost(own, longest, **spent, step=updating)
