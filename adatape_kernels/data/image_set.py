"""Sets of images with labels for training and for testing, and the normalisation of images."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

STATISTICS_IMAGES = 2000
"""Most images that mean and standard deviation are measured over."""
_BATCH = 100
# The number of files that are decoded at a time outside of training; they may be large.
_DECODED = 16
# How long a look at all images may take before it says how far it is.
_QUIET_SECONDS = 3


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


class ImagesOfManySizes(Protocol):
    """Images that each have a height and a width of their own; values as those of `Images`."""

    def __len__(self) -> int:
        """Return how many images there are."""
        ...

    def __getitem__(self, indices: Tensor, /) -> list[Tensor]:
        """Return the images at int64 indices (batch,), each (channels, height, width)."""
        ...


@dataclass(frozen=True)
class Subset:
    """Some of the images of a set; where they are files they stay undecoded until they are used."""

    images: Images
    """The images that are chosen from."""
    chosen: Tensor
    """(n,) int64, the indices of those that are chosen."""

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the chosen images at int64 indices (batch,)."""
        return self.images[self.chosen[indices]]


@dataclass(frozen=True)
class ImageSet:
    """Images for training and for testing, with labels (n,) int64 that index class_names.

    Example:
        >>> import torch
        >>> from adatape_kernels.data import ImageSet
        >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> data = ImageSet(images[:4], labels[:4], images[4:], labels[4:], ("cat", "dog"))
        >>> data.num_classes, len(data.test_images)
        (2, 2)
    """

    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What a user should know of how the set was found, a line each; files that were skipped."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def look(self) -> None:
        """Decode every image that is a file once, so that a damaged one shows now, not mid-epoch.

        Where that takes more than a few seconds and tqdm is installed, stderr shows how far it is.

        Raises:
            ValueError: an image cannot be decoded; the error names the file.
        """
        look_at(p for p in (self.train_images, self.test_images) if not isinstance(p, Tensor))

    def limited(self, train_images: int, seed: int) -> "ImageSet":
        """Return the set with some of its training images and all of its test images.

        Args:
            train_images: number of training images to keep.
            seed: decides which.

        Raises:
            ValueError: the set has fewer, or the number is not positive.
        """
        total = len(self.train_labels)
        if not 1 <= train_images <= total:
            raise ValueError(f"limit: expected 1 to {total} training images, got {train_images}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        kept = order[:train_images].sort().values
        return replace(
            self, train_images=Subset(self.train_images, kept), train_labels=self.train_labels[kept]
        )


@contextlib.contextmanager
def read_in_order(
    images: Images | ImagesOfManySizes, batches: Sequence[Tensor]
) -> Iterator[Iterator[Any]]:
    """Give the context of a pass over batches, whose images it yields one batch after another.

    Images that have worker processes for it are decoded ahead, as `loading.ReadAhead` says.

    Args:
        images: the images that are chosen from.
        batches: int64 indices, (batch,) each.
    """
    while isinstance(images, Subset):
        batches = [images.chosen[batch] for batch in batches]
        images = images.images
    ahead = getattr(images, "in_order", None)
    if ahead is None:
        yield (images[batch] for batch in batches)
        return
    with ahead(batches) as found:
        yield found


def look_at(parts: Iterable[Images | ImagesOfManySizes]) -> None:
    """Decode every image of some sets once, as `ImageSet.look` says."""
    parts = [*parts]
    with _progress(sum(map(len, parts))) as bar:
        for images in parts:
            with read_in_order(images, torch.arange(len(images)).split(_DECODED)) as batches:
                for found in batches:
                    bar.update(len(found))


class _NoBar:
    """Takes the place of a progress bar where tqdm is not installed."""

    def update(self, done: int) -> None:
        """Show nothing."""


def _progress(images: int) -> contextlib.AbstractContextManager[Any]:
    """Return a progress bar that shows itself after a few seconds, and goes when it is done."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(_NoBar())
    return tqdm(
        total=images,
        desc="looking at every image",
        unit=" images",
        delay=_QUIET_SECONDS,
        # A log file gets a line every few seconds instead of a moving bar.
        mininterval=0.1 if sys.stderr is not None and sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        leave=False,
    )


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return int64 indices (min(total, count),) that are spread evenly over range(total)."""
    return torch.arange(min(total, count)) * total // max(1, min(total, count))


def unit_range(images: Tensor) -> Tensor:
    """Return images, uint8 in 0 to 255 or float32 in 0 to 1, as float32 in 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


@dataclass(frozen=True)
class Normaliser:
    """Brings each channel to mean 0 and standard deviation 1.

    A model needs the normaliser that it was trained with.

    Example:
        >>> import torch
        >>> from adatape_kernels.data import Normaliser
        >>> normalise = Normaliser(mean=(0.5,), std=(0.25,))
        >>> normalise(torch.ones(1, 1, 1, 2)).tolist()
        [[[[2.0, 2.0]]]]
    """

    mean: tuple[float, ...]
    """Mean of each channel, of images in 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, of images in 0 to 1."""

    @classmethod
    def of(cls, images: Images | ImagesOfManySizes) -> "Normaliser":
        """Measure mean and standard deviation over at most 2,000 images, evenly spaced.

        Each pixel counts alike, so that of images of many sizes larger ones count more.

        The sums over uint8 images are computed in integers, so that the result does not depend on
        the number of threads.
        """
        count, total, squares = 0, torch.tensor(0), torch.tensor(0)
        # Sums of integers do not depend on how many images are taken at a time; files are uint8.
        exact = images[torch.zeros(1, dtype=torch.long)][0].dtype == torch.uint8
        size = _DECODED if exact else _BATCH
        for indices in evenly_spaced(len(images), STATISTICS_IMAGES).split(size):
            batch = torch.cat([image.flatten(1) for image in images[indices]], 1)
            scale = 255 if batch.dtype == torch.uint8 else 1
            batch = batch.long() if scale == 255 else batch.double()
            count += batch.shape[1]
            total, squares = total + batch.sum(1), squares + batch.square().sum(1)
        mean = total.double() / count
        variance = (squares.double() - count * mean.square()) / max(1, count - 1)
        # Images of one colour have a standard deviation of 0, which cannot be divided by.
        std = variance.clamp(min=0).sqrt().clamp(min=1e-3 * scale)
        return cls(tuple((mean / scale).tolist()), tuple((std / scale).tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return images ([batch,] channels, height, width), which are in 0 to 1, normalised."""
        mean, std = (
            torch.tensor(values, device=images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images - mean) / std
