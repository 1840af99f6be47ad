"""A step of the optimizer, the gradient of its batch, and what an epoch adds up of its steps."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.models import AdaTapeOutput, Classifier
from adatape_kernels.recipes.devices import moved
from adatape_kernels.recipes.distributed.dealing import Share
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.training.epoch_batches import StepBatch
from adatape_kernels.recipes.training.execution import Execution, Forward, computing_in, in_float32

STEPS_BETWEEN_READS = 20
"""So many steps of a GPU pass before the host waits for their losses."""

LossOf = Callable[[AdaTapeOutput, Tensor], Tensor]
"""The mean loss of a batch, of a model's output and the labels."""


class StepSums(NamedTuple):
    """What a step says of its batch, scalars on the device that computed it."""

    loss: Tensor
    """The mean over the images."""
    right: Tensor
    """Number of images whose largest logit is that of their label."""
    work: Tensor
    """Number of tape tokens that all images read, or of rows that all layers computed."""
    unit: str
    """Which of the two `work` is: "tape_tokens" or "rows"."""


def add_gradients(
    forward: Forward,
    loss_of: LossOf,
    pixels: Tensor,
    labels: Tensor,
    device: torch.device,
    execution: Execution,
    share: Share | None = None,
) -> StepSums:
    """Add the gradients of a batch's mean loss to those of the parameters.

    A part of the batch counts by its share of the images, so that parts of any sizes, on any number
    of ranks, add up to what the whole batch gives, but for rounding.

    Args:
        forward: the model, on the device; with a share what `Execution.forward_of` yields.
        loss_of: a mean over the examples that it is given.
        pixels: (batch, …) normalised images, on any device; with a share those of this rank.
        labels: (batch,) int64, or (batch, classes) a probability of each class.
        device: where to compute.
        execution: in which dtype, and in how many parts.
        share: what this rank computes of the batch, and the sums are of that alone; None where
            there is one process.
    """
    found, outputs = [], []
    parts = min(execution.accumulate, len(labels))
    if share is not None and execution.parallel == "fsdp":
        # Each rank brings its parameters together in each part, and the others wait for it.
        parts = min(execution.accumulate, share.most)
    split = zip(pixels.tensor_split(parts), labels.tensor_split(parts), strict=True)
    for number, (some_pixels, some_labels) in enumerate(split, start=1):
        count = len(some_labels)
        if not count:
            some_pixels, some_labels = pixels[:1], labels[:1]
        part = _Part(some_pixels, moved(some_labels, device), loss_of, device, execution)
        if share is None:
            loss, output = part.loss_and_output(forward)
            if parts > 1:
                loss = loss * (len(output) / len(labels))
            loss.backward()
        else:
            weight = share.weight(count)
            with share.dealer.forward.backward_pass(last=number == parts):
                both: Any = forward(part.loss_and_output)
                mean, output = both
                # The ranks' gradients become their mean, and are to be their sum.
                (mean * (weight * share.ranks.count)).backward()
            loss = mean.detach() * weight
            if count:
                outputs.append(output)
        if count:
            found.append(_sums(output, part.labels, loss.detach()))
    loss, right, work = (torch.stack(each).sum() for each in list(zip(*found, strict=True))[:3])
    if share is not None:
        share.learn(outputs)
        if not len(share.positions):
            right, work = torch.zeros_like(right), torch.zeros_like(work)
    return StepSums(loss, right, work, found[0].unit)


class _Part(NamedTuple):
    """A part of a step's batch, and what its loss is computed with."""

    pixels: Tensor
    labels: Tensor
    loss_of: LossOf
    device: torch.device
    execution: Execution

    def loss_and_output(self, forward: Forward) -> tuple[Tensor, AdaTapeOutput]:
        """Return the mean loss, and the output without gradients."""
        with computing_in(self.execution.dtype, self.device):
            output = forward(moved(self.pixels, self.device))
        output = in_float32(output)
        expected = self.labels
        if expected.is_floating_point():
            expected = expected.to(output.logits.dtype)
        return self.loss_of(output, expected), output.detach()


def _sums(output: AdaTapeOutput, labels: Tensor, loss: Tensor) -> StepSums:
    classes = labels if labels.dim() == 1 else labels.argmax(1)
    right = (output.logits.argmax(1) == classes).sum()
    if output.halted is None:
        return StepSums(loss, right, output.tape_lens.sum(), "tape_tokens")
    rows = sum(output.halted.rows_per_step)
    return StepSums(loss, right, torch.full_like(right, rows), "rows")


@dataclass
class EagerSteps:
    """Steps of training, each computed as it is called."""

    model: Classifier
    forward: Forward
    """The model, on its device, or a SharedGradients of it."""
    loss_of: LossOf
    optimizer: Optimizer
    averaged: AveragedModel | None
    """The moving average of the model's parameters, which each step updates; None for none."""
    max_grad_norm: float
    """Norm that a larger gradient of all parameters is scaled down to; infinity for none."""
    execution: Execution
    device: torch.device

    def __call__(
        self,
        batch: StepBatch,
        rate: float,
        limits: Mapping[str, Any],
        told: Callable[[StepSums], None],
    ) -> None:
        """Compute a step.

        Args:
            batch: what is computed.
            rate: the learning rate.
            limits: given to the model beside its images.
            told: called with what the step says, before a parameter changes.
        """
        self.set_rate(rate)
        told(self.gradients(batch.inputs, batch.targets, limits, batch.share))
        self.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def set_rate(self, rate: float) -> None:
        """Give the optimizer a learning rate, in a tensor where it has one there."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def gradients(
        self, pixels: Tensor, labels: Tensor, limits: Mapping[str, Any], share: Share | None = None
    ) -> StepSums:
        """Give the parameters the gradients of a batch, as `add_gradients` does, and no others."""
        self.optimizer.zero_grad()
        forward = functools.partial(self.forward, **limits)
        return add_gradients(
            forward, self.loss_of, pixels, labels, self.device, self.execution, share
        )

    def update(self) -> None:
        """Change the parameters by their gradients."""
        if self.max_grad_norm < math.inf:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()


class StepTally:
    """Sums over steps, which stay on the device until they are read.

    The CPU is read in every step, a GPU now and then, so that the host runs ahead of it. With
    several processes this is begun by `add` and ended by `take`, and goes on in between.

    Args:
        device: where the steps are computed.
        place: says which step a number, from 0 on, is, for errors.
        ranks: the processes, each of which adds its part of every step.
    """

    def __init__(self, device: torch.device, place: Callable[[int], str], ranks: Ranks = ALONE):
        self.place, self.ranks = place, ranks
        self.every = 1 if device.type == "cpu" else STEPS_BETWEEN_READS
        self.seen, self.loss, self.right, self.work, self.unit = 0, 0.0, 0.0, 0.0, ""
        self.steps, self.last_loss, self.last_right = 0, math.nan, math.nan
        self._unread: list[tuple[int, int, Tensor]] = []
        self._sent: _Sent | None = None

    def add(self, step: int, images: int, sums: StepSums) -> None:
        """Add a step.

        Args:
            step: its number.
            images: the size of its batch.
            sums: what it says.

        Raises:
            RuntimeError: a loss is not finite; the error names its step. With several processes
                `take` finds that, and on a GPU it is found some steps later.
        """
        self.take()
        self.unit = sums.unit
        numbers = (sums.loss, sums.right, sums.work)
        self._unread.append((step, images, torch.stack([each.double() for each in numbers])))
        if len(self._unread) >= self.every:
            self._send()
            if not self.ranks.several:
                self.take()

    def read(self) -> None:
        """Bring what was added to the host: `steps`, `seen` images, and sums over these.

        `last_loss` is that of the last step, and `last_right` the share that it was right about.

        Raises what `add` raises.
        """
        self.take()
        if self._unread:
            self._send()
            self.take()

    def _send(self) -> None:
        """Begin to add up over all processes what is on the device."""
        steps, images, sums = zip(*self._unread, strict=True)
        self._unread = []
        self._sent = _Sent(steps, images, self.ranks.summing(torch.stack(sums)))

    def take(self) -> None:
        """Wait for what `add` has sent to the other processes, if it has sent anything.

        Raises what `add` raises.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return
        together = sent.sums().tolist()
        each_step = zip(sent.steps, sent.images, together, strict=True)
        for step, images, (loss, right, work) in each_step:
            if not math.isfinite(loss):
                raise RuntimeError(f"loss: expected a finite value {self.place(step)}, got {loss}")
            self.steps, self.last_loss, self.last_right = self.steps + 1, loss, right / images
            self.seen += images
            self.loss += loss * images
            self.right += right
            self.work += work


class _Sent(NamedTuple):
    """Steps whose sums are on their way between the processes."""

    steps: tuple[int, ...]
    images: tuple[int, ...]
    sums: Callable[[], Tensor]
    """Waits for losses, right images and work of all processes, (steps, 3), and returns them."""
