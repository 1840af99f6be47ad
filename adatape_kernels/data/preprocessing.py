"""What becomes of an image before a model sees it: kept with the model that was trained so."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int, check_number, check_path, check_tensor, shown
from adatape_kernels.data.image_file import decode
from adatape_kernels.data.image_set import Normaliser, unit_range
from adatape_kernels.data.printable import printable

MOST_SIDE = 1 << 14
"""Most pixels of a side; images that are scaled to more take gigabytes."""
# Images are in 0 to 1. `Normaliser` measures no deviation below a thousandth.
_MOST_VALUE, _LEAST_DEVIATION = 1e9, 1e-9


@dataclass(frozen=True)
class Preprocessing:
    """Makes the input of a model from image files: size, channels, mean and deviation.

    Raises:
        ValueError: a value is out of range, or there is not one for each channel.
        TypeError: a value is of another type altogether.

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
    """Standard deviation of each channel, of images in 0 to 1; positive."""

    def __post_init__(self) -> None:
        """Check every value, since it may come from a file; they are kept in Python's types."""
        size = check_int("image_size", self.image_size, 1, MOST_SIDE)
        channels = check_int("channels", self.channels, 1, 3)
        if channels == 2:
            raise ValueError("channels: expected 1 or 3, got 2")
        object.__setattr__(self, "image_size", size)
        object.__setattr__(self, "channels", channels)
        for name, lowest in (("mean", -_MOST_VALUE), ("std", _LEAST_DEVIATION)):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or len(values) != channels:
                raise ValueError(f"{name}: expected {channels} numbers, got {shown(values)}")
            for value in values:
                check_number(name, value, lowest, _MOST_VALUE)
            object.__setattr__(self, name, tuple(map(float, values)))

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
            return cls(**{field.name: entries[field.name] for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "preprocessing: expected image_size, channels, mean and std, got a fault in "
                f"{printable(error, 200)}"
            ) from None

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
            TypeError: this is no tensor.
        """
        check_tensor("images", images)
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
        pixels = decode(check_path("file", file), self.image_size)
        if self.channels == 1:
            pixels = _grey(pixels)
        return self(pixels.unsqueeze(0))


def _grey(pixels: Tensor) -> Tensor:
    """Return (3, height, width) uint8 as (1, height, width): luma of ITU-R 601, rounded."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(3, 1, 1)
    return (pixels.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
