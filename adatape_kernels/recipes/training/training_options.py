"""The options of `train` that decide the loss and the regularisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn

from adatape_kernels.arguments import shown
from adatape_kernels.data import augment
from adatape_kernels.data.rand_augment import MOST_MAGNITUDE, RandAugment, require_kornia
from adatape_kernels.models.cross_entropy import LOSS_KINDS, SIGMOID_HEAD_BIAS, LossKind
from adatape_kernels.models.value_checks import as_choice, as_integer, as_number
from adatape_kernels.recipes.training.named_recipes import RECIPES

TRAINING_OPTIONS = (
    "recipe",
    "loss",
    "label_smoothing",
    "mixup",
    "randaugment",
    "randaugment_magnitude",
    "random_erasing",
    "ema",
    "max_grad_norm",
    "warmup_share",
)
"""The fields of TrainingOptions."""
_MOST_OPERATIONS = 15


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the loss and the regularisation, by the names of the command's options."""

    recipe: str | None
    """Whole defaults by name: small, for fashion-mnist and cifar10 on two cores, or imagenet,
    scenic's for AdaTape S/16 on ImageNet's folders or shards; None for those of the image set."""
    loss: LossKind
    """Cross entropy of all classes' softmax, or of each class's sigmoid, as scenic has it."""
    label_smoothing: float
    """Share of the target that is spread over all classes."""
    mixup: float
    """Both parameters of the Beta distribution by whose shares images are mixed; 0 for none."""
    randaugment: int
    """Number of RandAugment's operations that an image passes; 0 for none."""
    randaugment_magnitude: int
    """How strong RandAugment's operations are, 1 to 29, kornia's scale."""
    random_erasing: float
    """Probability with which noise overwrites a rectangle of an image."""
    ema: float
    """Evaluate and write a moving average of the parameters that keeps so much of itself at a step,
    as in 0.999; 0 for none."""
    max_grad_norm: float
    """Norm that a larger gradient of all parameters is scaled down to; 0 for none."""
    warmup_share: float
    """Share of all steps in which the learning rate rises."""

    def require_packages(self) -> None:
        """Raise RuntimeError where a package that an option needs is not installed."""
        if self.randaugment:
            require_kornia("randaugment")

    def start_head(self, head: nn.Module) -> None:
        """Give a new head the bias that the loss begins with."""
        if self.loss == "sigmoid" and isinstance(head, nn.Linear):
            nn.init.constant_(head.bias, SIGMOID_HEAD_BIAS)

    def regularised(
        self, change: Callable[[Tensor, Generator], Tensor]
    ) -> Callable[[Tensor, Generator], Tensor]:
        """Return a change of training images that is followed by what the options ask for."""
        randomly = None
        if self.randaugment:
            randomly = RandAugment(self.randaugment, self.randaugment_magnitude)
        if randomly is None and not self.random_erasing:
            return change

        def changed(images: Tensor, generator: Generator) -> Tensor:
            images = change(images, generator)
            if randomly is not None:
                images = randomly(images, generator)
            if self.random_erasing:
                images = augment.erase(images, self.random_erasing, generator)
            return images

        return changed


def check_training_option(field: str, value: object) -> Any:
    """Return a value of a field of TrainingOptions, numbers in Python's own types.

    Raises:
        ValueError: the value's type or range is not that of the field.
    """
    name = field.replace("_", "-")
    if field == "recipe":
        return None if value is None else as_choice(name, value, RECIPES)
    if field == "loss":
        return as_choice(name, value, LOSS_KINDS)
    if field == "randaugment":
        return as_integer(name, value, 0, _MOST_OPERATIONS)
    if field == "randaugment_magnitude":
        return as_integer(name, value, 1, MOST_MAGNITUDE)
    number = as_number(name, value)
    if field in ("mixup", "max_grad_norm"):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}: expected 0 or more, got {shown(number)}")
    elif not 0 <= number <= 1 or (field == "ema" and number == 1):
        expected = "0 to below 1" if field == "ema" else "0 to 1"
        raise ValueError(f"{name}: expected {expected}, got {shown(number)}")
    return number
