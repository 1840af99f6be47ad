"""What becomes of an image before a model sees it: kept with the model that was trained so."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.data.image_file import decode
from adatape_kernels.data.image_set import Normaliser, unit_range


@dataclass(frozen=True)
class Preprocessing:
    """Makes the input of a model from image files: size, channels, mean and deviation.

    Example:
        >>> import torch
        >>> from adatape_kernels.data import Preprocessing
        >>> preprocess = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.25,))
        >>> preprocess(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)).unique().tolist()
        [2.0]
    """

    image_size: int
    """Side in pixels that images are scaled and cut to."""
    channels: int
    """3 for colours, 1 for grey."""
    mean: tuple[float, ...]
    """Mean of each channel, of images in 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, of images in 0 to 1."""

    @classmethod
    def of(cls, image_size: int, normalise: Normaliser) -> "Preprocessing":
        """Return that of a model that was trained with this size and normaliser."""
        return cls(image_size, len(normalise.mean), tuple(normalise.mean), tuple(normalise.std))

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> "Preprocessing":
        """Return what `entries` returned, perhaps by way of JSON.

        Raises:
            ValueError: these are no such entries.
        """
        try:
            mean, std = (tuple(float(v) for v in entries[name]) for name in ("mean", "std"))
            made = cls(entries["image_size"], entries["channels"], mean, std)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"preprocessing: expected image_size, channels, mean and std, got {entries!r:.80}"
            ) from None
        sizes = made.image_size, made.channels
        if not all(type(n) is int and n >= 1 for n in sizes) or made.channels not in (1, 3):
            raise ValueError(
                f"preprocessing: expected a size of 1 or more and 1 or 3 channels, got {sizes}"
            )
        whole = all(-1e9 < v < 1e9 for v in mean) and all(0 < v < 1e9 for v in std)
        if not len(mean) == len(std) == made.channels or not whole:
            raise ValueError(
                f"preprocessing: expected a mean and a positive std for each of {made.channels} "
                f"channels, got {mean} and {std}"
            )
        return made

    def entries(self) -> dict[str, Any]:
        """Return the values by name, in types that JSON has."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Return images as the model takes them.

        Args:
            images: (batch, channels, image_size, image_size), uint8 in 0 to 255 or floating point
                in 0 to 1.

        Returns:
            float32 of the same shape, normalised.

        Raises:
            ValueError: the shape is another.
        """
        shape = (self.channels, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(f"images: expected (batch, {shape}), got {tuple(images.shape)}")
        return Normaliser(self.mean, self.std)(unit_range(images))

    def file(self, file: str | Path) -> Tensor:
        """Return an image file as the model takes it, (1, channels, image_size, image_size).

        Raises:
            ValueError: this is no image that can be decoded; the error names the file.
            RuntimeError: Pillow is not installed.
        """
        pixels = decode(Path(file), self.image_size)
        if self.channels == 1:
            pixels = _grey(pixels)
        return self(pixels.unsqueeze(0))


def _grey(pixels: Tensor) -> Tensor:
    """Return (3, height, width) uint8 as (1, height, width): luma of ITU-R 601, rounded."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
