"""The training loop that the demo and `train` share, and predictions over a whole set.

The order, the augmentation and the mixing of an epoch's images depend on its number and the seed
alone; everything else that is random comes from torch's own generator, whose state a checkpoint
holds. A run that goes on from the end of an epoch therefore repeats the curve of an unbroken one.
"""

import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.image_set import Images, ImageSet, Normaliser, unit_range
from adatape_kernels.data.mixup import Mixture
from adatape_kernels.models import AdaTapeOutput, Classifier
from adatape_kernels.models.cross_entropy import LOSS_KINDS, LossKind
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.recipes.devices import device_of, moved, wait
from adatape_kernels.recipes.distributed.dealing import Dealer
from adatape_kernels.recipes.distributed.imbalance import Imbalance
from adatape_kernels.recipes.drawn_thresholds import (
    ThresholdRange,
    as_threshold_range,
    limits_of_steps,
)
from adatape_kernels.recipes.execution import Execution, computing_in, in_float32
from adatape_kernels.recipes.joined_outputs import joined
from adatape_kernels.recipes.repeatable_sums import repeatable
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.train_step import StepTally, add_gradients

Augment = Callable[[Tensor, Generator], Tensor]
"""Changes images (batch, channels, height, width) in 0 to 1 by a generator's random numbers."""

PREDICT_BATCH = 256
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


@dataclass(frozen=True)
class EpochResult:
    """Results of one epoch of training.

    Loss and accuracy are means over the images, each measured in training mode and before the step
    that the image takes part in. Of two images that are mixed, the label of the larger share counts
    in the accuracy.
    """

    epoch: int
    """Number of the epoch, from 1 on."""
    loss: float
    accuracy: float
    images_per_second: float
    learning_rate: float
    """Learning rate of the epoch's last step."""
    imbalance: Imbalance | None = None
    """How equally several processes shared the rows; None for one process."""


def train(
    model: Classifier,
    data: ImageSet,
    plan: TrainPlan,
    normalise: Normaliser,
    augment: Augment,
    *,
    optimizer: Optimizer | None = None,
    averaged: AveragedModel | None = None,
    epochs_done: int = 0,
    title: str = "training",
    after_epoch: Callable[[EpochResult], str] | None = None,
    execution: Execution | None = None,
    bar: Any = None,
) -> None:
    """Train the model in place, where it is, with a progress bar on stderr.

    Args:
        model: the model, new or as the last epoch left it, on the device that is to compute.
        data: its training half is used.
        plan: how to train.
        normalise: applied to the images after `augment`.
        augment: applied to the images first.
        optimizer: the optimizer as the last epoch left it; None for a new one.
        averaged: the moving average of the model's parameters as the last epoch left it, which each
            step updates; None for none.
        epochs_done: number of epochs that model and optimizer have behind them.
        title: a few words that stand beside the progress bar.
        after_epoch: called with each epoch's result; returns a line to print.
        execution: how steps are computed; None for float32 in one part.
        bar: what shows the progress in the place of a bar on stderr, by the methods of tqdm that
            are called: update, set_postfix and write; used as a context.

    Raises:
        ValueError: the last batch is one image, which a batch norm of the model cannot train on,
            the parts of a batch do not add up to it, or epochs_done is out of range.
        TypeError: the model is no module, data no ImageSet, or the plan no TrainPlan.
        RuntimeError: the loss is not finite; the error names epoch and step.
    """
    from tqdm import tqdm

    check_kind("model", model, nn.Module)
    check_kind("data", data, ImageSet)
    check_kind("plan", plan, TrainPlan)
    as_integer("epochs_done", epochs_done, 0, plan.epochs)
    execution = Execution() if execution is None else execution
    execution.check_model(model)
    execution.check_thresholds(plan.halt_threshold_range)
    _check_batches(model, plan, len(data.train_labels))
    optimizer = plan.optimizer(model) if optimizer is None else optimizer
    per_epoch = plan.images_per_epoch(len(data.train_labels))
    with lenient_output(), repeatable():
        if bar is None:
            bar = tqdm(
                total=plan.epochs * per_epoch,
                initial=epochs_done * per_epoch,
                desc=title,
                unit=" images",
                # A log file gets a line every few seconds instead of a moving bar.
                mininterval=0.1 if sys.stderr.isatty() else 10,
                dynamic_ncols=True,
            )
        with bar, execution.forward_of(model) as forward:
            dealer = Dealer(forward, execution.ranks, len(data.train_labels))
            for epoch in range(epochs_done, plan.epochs):
                model.train()
                result = _train_epoch(
                    model,
                    dealer,
                    execution,
                    data,
                    plan,
                    normalise,
                    augment,
                    optimizer,
                    averaged,
                    epoch,
                    bar,
                )
                if after_epoch is not None:
                    bar.write(after_epoch(result))


def _check_batches(model: nn.Module, plan: TrainPlan, images: int) -> None:
    """Raise ValueError where a module needs the statistics of a batch that has one image."""
    smallest = plan.images_per_epoch(images) % plan.batch or min(plan.batch, images)
    if smallest > 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
            raise ValueError(
                f"batch: expected a size that leaves no single image of {images} over, which the "
                f"batch norm {name} cannot train on, got {plan.batch}"
            )


def _train_epoch(
    model: Classifier,
    dealer: Dealer,
    execution: Execution,
    data: ImageSet,
    plan: TrainPlan,
    normalise: Normaliser,
    augment: Augment,
    optimizer: Optimizer,
    averaged: AveragedModel | None,
    epoch: int,
    bar: Any,
) -> EpochResult:
    """Train for one epoch, whose number `epoch` counts from 0, and move the progress bar `bar`."""
    images = len(data.train_labels)
    per_epoch = plan.steps_per_epoch(images)
    generator = epoch_generator(plan.seed, epoch)
    order = torch.randperm(images, generator=generator)
    limits = limits_of_steps(plan.halt_threshold_range, plan.seed, epoch, per_epoch)
    device = device_of(model)
    dealer.begin_epoch(plan.seed, epoch)
    tally = StepTally(device, lambda step: f"at epoch {epoch + 1}, step {step}", execution.ranks)

    def loss_of(output: AdaTapeOutput, targets: Tensor) -> Tensor:
        smoothing = plan.label_smoothing
        return model.loss(output, targets, label_smoothing=smoothing, kind=plan.loss)

    wait(device)
    start = time.perf_counter()
    for step in range(per_epoch):
        batch = order[step * plan.batch :][: plan.batch]
        labels = data.train_labels[batch]
        rate = plan.learning_rate_at(epoch * per_epoch + step, plan.epochs * per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = normalise(augment(unit_range(data.train_images[batch]), generator))
        targets = labels
        if plan.mixup:
            mixture = Mixture.draw(len(batch), plan.mixup, generator)
            inputs, targets = mixture.images(inputs), mixture.targets(labels, data.num_classes)
        limited = functools.partial(dealer.forward, **limits[step])
        optimizer.zero_grad()
        share = dealer.share(batch)
        sums = add_gradients(limited, loss_of, inputs, targets, device, execution, share)
        tally.add(step, len(batch), sums)
        if plan.max_grad_norm < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
        optimizer.step()
        if averaged is not None:
            averaged.update_parameters(model)
        if tally.seen:  # of a GPU nothing is known before the first read
            bar.set_postfix(
                {
                    "epoch": f"{epoch + 1}/{plan.epochs}",
                    "loss": f"{tally.loss / tally.seen:.2f}",
                    "accuracy": f"{tally.right / tally.seen:.1%}",
                    tally.unit: f"{tally.work / tally.seen:.1f}",
                },
                refresh=False,
            )
        bar.update(len(batch))
    tally.read()
    wait(device)
    seen = tally.seen
    speed = seen / (time.perf_counter() - start)
    loss, right = tally.loss / seen, tally.right / seen
    return EpochResult(epoch + 1, loss, right, speed, rate, dealer.end_epoch())


def predict(
    model: Classifier,
    images: Images,
    normalise: Normaliser,
    *,
    dtype: str = "float32",
    **limits: Any,
) -> AdaTapeOutput:
    """Return a model's output for all images, computed in evaluation mode and in batches.

    Args:
        model: the model, which is left in the mode that it was in, and computes where it is.
        images: uint8 or float32.
        normalise: what the model was trained with.
        dtype: what products are computed in, one of `execution.DTYPES`.
        limits: halt_threshold and num_tape_tokens, in the place of an AdaTape's own.

    Returns:
        The output, on the CPU.
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    with torch.no_grad(), computing_in(dtype, device):
        outputs = [
            in_float32(model(moved(normalise(unit_range(images[batch])), device), **limits))
            for batch in torch.arange(len(images)).split(PREDICT_BATCH)
        ]
    model.train(was_training)
    return joined(outputs).to("cpu")


def accuracy(output: AdaTapeOutput, labels: Tensor, when: str = "") -> float:
    """Return the share of examples, 0 to 1, whose largest logit is that of their label.

    Raises RuntimeError where a logit is not finite; `when` then stands in the error.
    """
    wrong = output.logits[~output.logits.isfinite()]
    if len(wrong):
        raise RuntimeError(f"logits: expected finite values{when}, got {wrong[0].item()}")
    return (output.logits.argmax(1) == labels.to(output.device)).double().mean().item()


def epoch_generator(seed: int, epoch: int) -> Generator:
    """Return a generator that is independent of those of other seeds and other epochs.

    Raises:
        ValueError: one of the two is no integer of 0 or more.
    """
    seed, epoch = as_integer("seed", seed, 0), as_integer("epoch", epoch, 0)
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))
