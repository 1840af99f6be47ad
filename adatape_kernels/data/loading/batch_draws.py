"""Where the random numbers of an epoch and of its images come from."""

import numpy as np
import torch
from torch import Generator, Tensor


def generator_of(*numbers: int) -> Generator:
    """Return a generator that is independent of those of other numbers, each of which is 0 or more.

    Numbers that differ by zeros at their end alone have the same generator.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))


def order_of_epoch(images: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in an epoch, (images,) int64.

    Args:
        images: number of training images.
        seed: that of the run.
        epoch: number of the epoch, from 0 on.
    """
    return torch.randperm(images, generator=generator_of(seed, epoch))


def image_generator(seed: int, epoch: int, image: int) -> Generator:
    """Return what augments and mixes an image, whatever batch and process it is in.

    Args:
        seed: that of the run.
        epoch: number of the epoch, from 0 on.
        image: number of the image in the training set, from 0 on.
    """
    # Number 0 would have the generator of the epoch's order.
    return generator_of(seed, epoch, image + 1)
