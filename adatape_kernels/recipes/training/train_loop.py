"""The training loop that the demo and `train` share, and predictions over a whole set.

The order of an epoch's images depends on its number and the seed alone, and so do their
augmentation and mixing, in which a loader takes each image's number besides. Everything else that
is random comes from torch's own generator, whose state a checkpoint holds. A run that goes on from
the end of an epoch therefore repeats the curve of an unbroken one.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.image_set import (
    Images,
    ImageSet,
    Normaliser,
    read_in_order,
    unit_range,
)
from adatape_kernels.data.loading import BatchLoader, LoadingTimes
from adatape_kernels.data.loading.batch_draws import generator_of
from adatape_kernels.models import AdaTapeOutput, Classifier
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.devices import device_of, moved, wait
from adatape_kernels.recipes.distributed.dealing import Dealer
from adatape_kernels.recipes.distributed.imbalance import Imbalance
from adatape_kernels.recipes.distributed.loading_of_ranks import LoadingOfRanks, loading_of
from adatape_kernels.recipes.joined_outputs import joined
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.deterministic_mode import repeatable
from adatape_kernels.recipes.training.drawn_thresholds import limits_of_steps
from adatape_kernels.recipes.training.epoch_batches import Augment, drawn_by_epoch, loaded
from adatape_kernels.recipes.training.execution import Execution, computing_in, in_float32
from adatape_kernels.recipes.training.graphed_step import GraphedSteps
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.train_step import EagerSteps, StepTally

PREDICT_BATCH = 256


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
    loading: LoadingTimes | LoadingOfRanks | None = None
    """How long processes waited for their batches; None where they drew them themselves."""
    imbalance: Imbalance | None = None
    """How equally several processes shared the rows; None for one process."""

    def remarks(self) -> list[str]:
        """Return what is said of the loading and of the processes, if there is anything."""
        loading = [] if self.loading is None else [self.loading.line()]
        return loading + ([] if self.imbalance is None else [self.imbalance.words()])


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
    loader: BatchLoader | None = None,
    rows: Tensor | None = None,
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
        loader: prepares the batches of `plan`, so that neither `normalise` nor `augment` is called;
            None to draw them here, from one generator for each epoch.
        rows: (images,) int64, how many rows each image took when it was last seen, or 0; several
            processes deal images out by it, and overwrite it behind each epoch. None to begin with
            images of one length.

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
    execution.check_device(device_of(model))
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
        with bar, execution.forward_of(model, optimizer, averaged) as forward:
            dealer = Dealer(forward, execution.ranks, len(data.train_labels), rows)
            eager = EagerSteps(
                model,
                forward,
                functools.partial(model.loss, label_smoothing=plan.label_smoothing, kind=plan.loss),
                optimizer,
                averaged,
                plan.max_grad_norm,
                execution,
                device_of(model),
            )
            steps = GraphedSteps(eager, min(plan.batch, per_epoch)) if execution.graph else eager
            for epoch in range(epochs_done, plan.epochs):
                model.train()
                result = _train_epoch(
                    steps, dealer, execution, data, plan, normalise, augment, epoch, bar, loader
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
    steps: EagerSteps | GraphedSteps,
    dealer: Dealer,
    execution: Execution,
    data: ImageSet,
    plan: TrainPlan,
    normalise: Normaliser,
    augment: Augment,
    epoch: int,
    bar: Any,
    loader: BatchLoader | None,
) -> EpochResult:
    """Train for one epoch, whose number `epoch` counts from 0, and move the progress bar `bar`."""
    images = len(data.train_labels)
    per_epoch = plan.steps_per_epoch(images)
    limits = limits_of_steps(plan.halt_threshold_range, plan.seed, epoch, per_epoch)
    device = steps.device
    dealer.begin_epoch(plan.seed, epoch)
    # Both count from 1, as epochs do wherever a person reads of them.
    where = f"at epoch {epoch + 1}, step {{}} of {per_epoch}"
    tally = StepTally(device, lambda step: where.format(step + 1), execution.ranks)

    wait(device)
    start = time.perf_counter()
    if loader is None:
        batches = drawn_by_epoch(data, plan, epoch, normalise, augment, dealer)
    else:
        batches = loaded(loader, epoch, dealer)
    for step, batch in enumerate(batches):
        rate = plan.learning_rate_at(epoch * per_epoch + step, plan.epochs * per_epoch)
        if not batch.images:  # none of them could be read
            continue
        told = functools.partial(tally.add, step, batch.images)
        steps(batch, rate, limits[step], told)
        tally.take()
        if tally.seen:  # of a GPU nothing is known before the first read
            bar.set_postfix(
                {
                    "epoch": f"{epoch + 1}/{plan.epochs}",
                    "loss": f"{tally.loss / tally.seen:.2f}",
                    "accuracy": f"{tally.right / tally.seen:.1%}",
                    tally.unit: f"{tally.work / tally.seen:.1f}",
                    **({} if loader is None else loader.times.postfix()),
                },
                refresh=False,
            )
        bar.update(batch.images)
    tally.read()
    wait(device)
    seen = tally.seen
    speed = seen / (time.perf_counter() - start)
    return EpochResult(
        epoch + 1,
        tally.loss / seen,
        tally.right / seen,
        speed,
        rate,
        None if loader is None else loading_of(loader.times, execution.ranks),
        dealer.end_epoch(),
    )


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
    parts = torch.arange(len(images)).split(PREDICT_BATCH)
    with torch.no_grad(), computing_in(dtype, device), read_in_order(images, parts) as batches:
        outputs = [
            in_float32(model(moved(normalise(unit_range(batch)), device), **limits))
            for batch in batches
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
    return generator_of(seed, epoch)
