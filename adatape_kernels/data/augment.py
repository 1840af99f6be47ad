"""Random changes of training images, which are batches (n, channels, height, width) in 0 to 1.

A generator of the CPU gives all random numbers, so that they are the same wherever the images are;
what comes back has the shape, the dtype and the device of the images.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def turn_and_move(images: Tensor, generator: Generator) -> Tensor:
    """Turn images by up to 11 degrees, scale them by up to 15 %, move them by up to 10 % of a side.

    Pixels from outside of an image take the colour of its border.
    """
    batch = len(images)

    def symmetric(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1).to(images.device)

    angle, scale = 0.2 * symmetric(batch), 1 + 0.15 * symmetric(batch)
    dx, dy = 0.2 * symmetric(2, batch)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, -sine, dx], 1), torch.stack([sine, cosine, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Move each image by up to `padding` pixels along both axes.

    Pixels from outside of an image are black, which is 0.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    places = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    top, left = places.squeeze(2).to(images.device)
    # A view of all places, of which whole images are chosen: one index for each of them, where an
    # index for each pixel takes seven times as long.
    every_place = padded.unfold(2, height, 1).unfold(3, width, 1)
    # Indexing with a slice between index tensors puts their axis, the images, first.
    return every_place[torch.arange(batch, device=images.device), :, top, left]


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror images left to right, each with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return images.flip(3).where(mirrored.to(images.device), images)


def erase(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Overwrite a rectangle of each image by noise, each with the given probability.

    A rectangle has 2 to 33 % of an image's area, and a height of 0.3 to 3.3 times its width where
    that fits into the image.

    Source: Zhong et al., Random Erasing Data Augmentation.
    """
    batch, _, height, width = images.shape

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    erased = torch.rand(batch, generator=generator) < probability
    area = between(0.02, 0.33) * height * width
    ratio = between(math.log(0.3), math.log(3.3)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top = (between(0, 1) * (height - tall + 1)).floor()
    left = (between(0, 1) * (width - wide + 1)).floor()
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    top, left, tall, wide = (edge.view(-1, 1, 1) for edge in (top, left, tall, wide))
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    noise = torch.rand(images.shape, generator=generator).to(images)
    covered = (inside & erased.view(-1, 1, 1)).unsqueeze(1).to(images.device)
    return noise.where(covered, images)
