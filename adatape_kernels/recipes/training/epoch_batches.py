"""The batches of an epoch as its steps compute them, each rank its share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from adatape_kernels.data.image_set import ImageSet, Normaliser, unit_range
from adatape_kernels.data.loading import BatchLoader
from adatape_kernels.data.loading.batch_draws import generator_of
from adatape_kernels.data.mixup import Mixture
from adatape_kernels.recipes.distributed.dealing import Dealer, Share
from adatape_kernels.recipes.training.train_plan import TrainPlan

Augment = Callable[[Tensor, Generator], Tensor]
"""Changes images (batch, channels, height, width) in 0 to 1 by a generator's random numbers."""


@dataclass(frozen=True)
class StepBatch:
    """What this process computes in a step."""

    inputs: Tensor
    """(n, channels, height, width) float32, as the model takes them."""
    targets: Tensor
    """(n,) int64 labels, or (n, classes) float32, a probability of each class."""
    images: int
    """Number of images that all processes compute together; 0 where none could be read."""
    share: Share | None
    """Which part of the batch this is; None for all of it."""


def drawn_by_epoch(
    data: ImageSet,
    plan: TrainPlan,
    epoch: int,
    normalise: Normaliser,
    augment: Augment,
    dealer: Dealer,
) -> Iterator[StepBatch]:
    """Yield batches that are drawn from one generator, each behind the one before it.

    Each process draws what all compute, and takes its share of it.

    Args:
        data: its training half is used.
        plan: how the images are divided into batches and mixed.
        epoch: number of the epoch, from 0 on.
        normalise: applied to the images after `augment`.
        augment: applied to the images first.
        dealer: says which share is this process's.
    """
    # The order comes first, and then all that is drawn for one batch after another.
    generator = generator_of(plan.seed, epoch)
    order = torch.randperm(len(data.train_labels), generator=generator)
    for number in range(plan.steps_per_epoch(len(order))):
        chosen = order[number * plan.batch :][: plan.batch]
        labels = data.train_labels[chosen]
        inputs = normalise(augment(unit_range(data.train_images[chosen]), generator))
        if plan.mixup:
            mixture = Mixture.draw(len(chosen), plan.mixup, generator)
            inputs, labels = mixture.images(inputs), mixture.targets(labels, data.num_classes)
        share = dealer.share(chosen)
        if share is not None:
            inputs, labels = share.taken(inputs), share.taken(labels)
        yield StepBatch(inputs, labels, len(chosen), share)


def loaded(loader: BatchLoader, epoch: int, dealer: Dealer) -> Iterator[StepBatch]:
    """Yield batches that a loader has prepared, of which each process loads its share alone.

    Args:
        loader: prepares batches, or parts of them.
        epoch: number of the epoch, from 0 on.
        dealer: says which share is this process's.

    Raises what `BatchLoader.epoch` raises.
    """
    maker = loader.maker

    def share_of(batch: int) -> Share | None:
        return dealer.share(maker.numbers(epoch, batch), together=2 if maker.mixup else 1)

    def positions(batch: int) -> Tensor | None:
        share = share_of(batch)
        # A rank without images takes one all the same, with the weight 0.
        return share if share is None else share.taken(torch.arange(share.images))

    for number, batch in enumerate(loader.epoch(epoch, positions)):
        share, count = share_of(number), len(batch.targets)
        if share is None:
            yield StepBatch(batch.inputs, batch.targets, count, None)
            continue
        if maker.skip:
            own = batch.positions[: len(share.positions)]
            share = replace(share, positions=own, images=dealer.total(len(own)))
        inputs, targets = batch.inputs, batch.targets
        if not count:  # none of this rank's images could be read
            inputs, targets = maker.blank()
        yield StepBatch(inputs, targets, share.images, share)
    if maker.skip and dealer.ranks.several and loader.unreadable is not None:
        loader.unreadable.add(dealer.ranks.gathered([*loader.unreadable.reasons.items()]))
