"""Images with labels, split in two, and the shift and scale that a model sees them through."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

STATISTICS_IMAGES = 2000
_AT_ONCE = 100


class Images(Protocol):
    """Images of one size: a Tensor (n, channels, height, width), or files decoded on access.

    uint8 images hold 0 to 255, float32 ones 0 to 1.
    """

    def __len__(self) -> int:
        """Return how many images there are."""
        ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return the images at int64 indices (batch,) as (batch, channels, height, width)."""
        ...


@dataclass(frozen=True)
class Subset:
    """Those of some images that stand at `chosen` (n,), still undecoded where they are files."""

    images: Images
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.images[self.chosen[indices]]


@dataclass(frozen=True)
class ImageSet:
    """Images and labels (n,) int64, split in two; a label is an index of class_names."""

    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def limited(self, train_images: int, seed: int) -> "ImageSet":
        """Return the set with so many of its training images, drawn by seed.

        Raises:
            ValueError: there are fewer.
        """
        total = len(self.train_labels)
        if not 1 <= train_images <= total:
            raise ValueError(f"limit: expected 1 to {total} training images, got {train_images}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        kept = order[:train_images].sort().values
        return replace(
            self, train_images=Subset(self.train_images, kept), train_labels=self.train_labels[kept]
        )


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return `count` indices spread over range(total), or all of them where there are fewer."""
    return torch.arange(min(total, count)) * total // max(1, min(total, count))


def unit_range(images: Tensor) -> Tensor:
    """Return images as float32 in 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


@dataclass(frozen=True)
class Normaliser:
    """Shifts and scales each channel; its numbers belong to the model that was trained with it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Images) -> "Normaliser":
        """Measure mean and standard deviation over at most 2,000 images, evenly spaced.

        Sums of bytes are exact, so a set has the same numbers whatever the number of threads.
        """
        count, total, squares = 0, torch.tensor(0), torch.tensor(0)
        for indices in evenly_spaced(len(images), STATISTICS_IMAGES).split(_AT_ONCE):
            batch = images[indices]
            scale = 255 if batch.dtype == torch.uint8 else 1
            batch = batch.transpose(0, 1).flatten(1)
            batch = batch.long() if scale == 255 else batch.double()
            count += batch.shape[1]
            total, squares = total + batch.sum(1), squares + batch.square().sum(1)
        mean = total.double() / count
        variance = (squares.double() - count * mean.square()) / max(1, count - 1)
        # An image set of one colour has no deviation to divide by.
        std = variance.clamp(min=0).sqrt().clamp(min=1e-3 * scale)
        return cls(tuple((mean / scale).tolist()), tuple((std / scale).tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (batch, channels, height, width) in 0 to 1 as the model sees them."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std
