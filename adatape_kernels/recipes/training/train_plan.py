"""How a run of training steps is laid out: its length, its rates, its loss."""

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW

from adatape_kernels.models.cross_entropy import LOSS_KINDS, LossKind
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.recipes.training.drawn_thresholds import ThresholdRange, as_threshold_range

MOST_EPOCHS = 1_000_000
"""Most epochs that a plan may have."""


@dataclass(frozen=True)
class TrainPlan:
    """How to train: with AdamW, whose learning rate rises linearly and falls as a cosine to 0.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int
    """Number of passes over the training images."""
    batch: int
    """Number of images in a step of the optimizer."""
    learning_rate: float
    """The highest learning rate."""
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    """Share of the target that is spread over all classes."""
    warmup_share: float = 0.02
    """Share of all steps in which the learning rate rises."""
    max_grad_norm: float = math.inf
    """Norm that the gradient of all parameters is scaled down to where it is larger."""
    seed: int = 0
    """Decides, with the number of the epoch, the order and the augmentation of the images."""
    drop_rest: bool = False
    """Whether an epoch leaves out the images that do not fill a last batch."""
    loss: LossKind = "softmax"
    """The cross entropy of the classes' distribution, "softmax", or of each class, "sigmoid"."""
    mixup: float = 0.0
    """Both parameters of the Beta distribution by whose shares images are mixed; 0 for none."""
    decay_after_warmup: bool = False
    """Whether the cosine begins where the warm-up ends, as scenic's, and not at the first step."""
    halt_threshold_range: ThresholdRange | None = None
    """What each step draws its halting threshold from; None for the model's own in all steps."""

    def __post_init__(self) -> None:
        """Check the numbers before any training."""
        for name, least, most in (
            ("epochs", 1, MOST_EPOCHS),
            ("batch", 1, None),
            ("seed", 0, (1 << 32) - 1),
        ):
            number = as_integer(name, getattr(self, name), least)
            self._set(name, as_integer(name, number, least, most))
        for name, shown_name in (
            ("learning_rate", "lr"),
            ("weight_decay", "weight-decay"),
            ("label_smoothing", "label_smoothing"),
            ("warmup_share", "warmup_share"),
            ("max_grad_norm", "max_grad_norm"),
            ("mixup", "mixup"),
        ):
            self._set(name, as_number(shown_name, getattr(self, name)))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"lr: expected a number above 0, got {self.learning_rate}")
        for value, shown_name in ((self.weight_decay, "weight-decay"), (self.mixup, "mixup")):
            if not 0 <= value < math.inf:
                raise ValueError(f"{shown_name}: expected 0 or more, got {value}")
        for name in ("label_smoothing", "warmup_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: expected above 0, got {self.max_grad_norm}")
        for name in ("drop_rest", "decay_after_warmup"):
            as_flag(name, getattr(self, name))
        as_choice("loss", self.loss, LOSS_KINDS)
        limits = self.halt_threshold_range
        if limits is not None:
            self._set("halt_threshold_range", as_threshold_range("halt-threshold-range", limits))

    def _set(self, name: str, value: object) -> None:
        """Replace a field by an equal value of the type that it is declared with."""
        object.__setattr__(self, name, value)

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of steps that an epoch over so many images takes."""
        if self.drop_rest:
            return max(1, images // self.batch)
        return -(-images // self.batch)

    def images_per_epoch(self, images: int) -> int:
        """Return how many of so many images an epoch uses."""
        return min(images, self.steps_per_epoch(images) * self.batch)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step`, counted from 0, of a run of `steps` steps."""
        rising = self.warmup_share * steps
        warm_up = min(1.0, (step + 1) / max(1.0, rising))
        before = min(rising, steps - 1) if self.decay_after_warmup else 0.0
        gone = max(0.0, step - before) / (steps - before)
        return self.learning_rate * warm_up * (1 + math.cos(math.pi * gone)) / 2

    def optimizer(self, model: nn.Module) -> AdamW:
        """Return a new optimizer of the model's parameters."""
        return AdamW(
            model.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
