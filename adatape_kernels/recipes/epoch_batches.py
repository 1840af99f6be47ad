"""The batches of an epoch, drawn from one generator where they are trained on."""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from adatape_kernels.data.image_set import ImageSet, Normaliser, unit_range
from adatape_kernels.data.loading import PreparedBatch
from adatape_kernels.data.mixup import Mixture


def drawn_by_epoch(
    data: ImageSet,
    batch: int,
    batches: int,
    generator: Generator,
    normalise: Normaliser,
    augment: Callable[[Tensor, Generator], Tensor],
    mixup: float,
) -> Iterator[PreparedBatch]:
    """Yield batches of training images, each drawn behind the one before it.

    Args:
        data: its training half is used.
        batch: number of images of a batch; the last one may have fewer.
        batches: number of batches.
        generator: gives the order, and then all that is drawn for one batch after another.
        normalise: applied to the images after `augment`.
        augment: applied to the images first.
        mixup: both parameters of the Beta distribution that images are mixed by; 0 for none.
    """
    order = torch.randperm(len(data.train_labels), generator=generator)
    for number in range(batches):
        chosen = order[number * batch :][:batch]
        labels = data.train_labels[chosen]
        inputs = normalise(augment(unit_range(data.train_images[chosen]), generator))
        if mixup:
            mixture = Mixture.draw(len(chosen), mixup, generator)
            inputs, labels = mixture.images(inputs), mixture.targets(labels, data.num_classes)
        yield PreparedBatch(inputs, labels)
