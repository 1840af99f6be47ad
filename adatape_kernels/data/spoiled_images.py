"""Images made worse: noise and blur, to see what a model does about them."""

import torch
from torch import Generator, Tensor
from torch.nn import functional


def noisy(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Return images (batch, channels, height, width) in 0 to 1 with normal noise, kept in 0 to 1.

    Args:
        images: float images.
        deviation: the noise's standard deviation.
        generator: where the random numbers come from, one of the CPU.
    """
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + deviation * noise.to(images.device)).clamp(0, 1)


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Return images (batch, channels, height, width) under a Gaussian blur.

    Pixels beyond an edge are those of the edge.

    Args:
        images: float images.
        deviation: the Gaussian's standard deviation, in pixels.
    """
    reach = max(1, round(3 * deviation))
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.softmax(-(places**2) / (2 * deviation**2), 0)
    channels = images.shape[1]
    padded = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(padded, weights.expand(channels, 1, 1, -1), groups=channels)
    columns = weights[:, None].expand(channels, 1, -1, 1)
    return functional.conv2d(rows, columns, groups=channels)
