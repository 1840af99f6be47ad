"""Folders of images that keep their aspect: each has as many patches as a limit lets it have."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int, check_path, shown
from adatape_kernels.data.image_file import MOST_PIXELS, decode_to, sides_in_file
from adatape_kernels.data.image_folder import DECODERS, labelled_files
from adatape_kernels.data.image_set import look_at
from adatape_kernels.data.printable import printable


def aspect_grid(height: int, width: int, *, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Return the grid of patches that an image is brought to while it keeps its aspect.

    The shorter side gets the most patches with which the longer one, in proportion and rounded to
    whole patches, keeps the grid within the limit, but never more than it has pixels for: no image
    is enlarged but one that is narrower than a patch. An image whose sides differ by a factor above
    max_patches gets a grid of 1 by max_patches, and loses its ends.

    Args:
        height, width: of the image, in pixels.
        patch_size: side of a patch, in pixels.
        max_patches: most patches of an image.

    Returns:
        Rows and columns, each at least 1, with rows · columns at most max_patches. An image that is
        turned by a quarter has its grid turned.

    Raises:
        ValueError: a number is below 1.
        TypeError: a number is no int.

    Example:
        >>> from adatape_kernels.data import aspect_grid
        >>> aspect_grid(480, 640, patch_size=16, max_patches=196)
        (12, 16)
        >>> aspect_grid(64, 32, patch_size=16, max_patches=196)
        (4, 2)
    """
    height, width = check_int("height", height, 1), check_int("width", width, 1)
    patch_size = check_int("patch_size", patch_size, 1)
    max_patches = check_int("max_patches", max_patches, 1)
    short, long = sorted((height, width))
    fewer, more = 1, max_patches
    for patches in range(max(1, min(short // patch_size, math.isqrt(max_patches))), 0, -1):
        in_proportion = (2 * patches * long + short) // (2 * short)  # rounded half up
        if patches * in_proportion <= max_patches:
            fewer, more = patches, in_proportion
            break
    return (fewer, more) if height <= width else (more, fewer)


class AspectImages:
    """Image files as uint8 tensors (3, height, width) of many sizes, decoded on access.

    An image is turned upright, and scaled and cut to `aspect_grid` patches: at most half a patch is
    lost at each border of a side that had no whole number of them.

    Args:
        files: the image files.
        patch_size: side of a patch, in pixels; sides of images are multiples of it.
        max_patches: most patches of an image.

    Raises:
        ValueError: a number is out of range.
        TypeError: a number is no int, or a file no path.
    """

    def __init__(self, files: Sequence[str | Path], *, patch_size: int, max_patches: int):
        if isinstance(files, str | bytes) or not isinstance(files, Sequence):
            raise TypeError(f"files: expected a sequence of paths, got {shown(files)}")
        self.files = tuple(check_path("files", file) for file in files)
        self.patch_size = check_int("patch_size", patch_size, 1, math.isqrt(MOST_PIXELS))
        most = MOST_PIXELS // self.patch_size**2
        self.max_patches = check_int("max_patches", max_patches, 1, most)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> list[Tensor]:
        """Decode the images at int64 indices (batch,).

        Raises:
            ValueError: a file is damaged or of another format; the error names it.
        """
        files = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(DECODERS) as pool:
            return list(pool.map(lambda file: decode_to(file, self._sides), files))

    @cached_property
    def patch_counts(self) -> Tensor:
        """Number of patches of each image, (n,) int64, from the heads of the files.

        Raises:
            ValueError: a file is no image; the error names it.
        """
        sides = (self._sides(*sides_in_file(file)) for file in self.files)
        area = self.patch_size**2
        return torch.tensor([height * width // area for height, width in sides], dtype=torch.int64)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = aspect_grid(
            height, width, patch_size=self.patch_size, max_patches=self.max_patches
        )
        return rows * self.patch_size, columns * self.patch_size


class AspectFolder:
    """A folder of classes whose images keep their aspect, for `packed_batches`.

    Args:
        folder: holds a folder of image files for each class; or it holds train/ and one of val/
            and test/, which each hold such folders.
        patch_size: side of a patch, in pixels, as the model has it.
        max_patches: most patches of an image.
        seed: where there is no train/, decides which fifth of each class is for the test.

    Attributes:
        train_images, test_images: `AspectImages`.
        train_labels, test_labels: (n,) int64, which index class_names.
        class_names: the names of the classes.
        notes: what a user should know of how the files were found, a line each.

    Raises:
        ValueError: a number is out of range, there are fewer than two classes, a class has no image
            or too few to split, or the test has other classes than the training.
        TypeError: an argument is of another type altogether.
        RuntimeError: Pillow is not installed.

    Example:
        >>> import adatape_kernels as ak
        >>> try:
        ...     photos = ak.data.AspectFolder("no-such-folder", patch_size=16, max_patches=196)
        ... except ValueError as error:
        ...     print(error)
        folder: expected a folder at no-such-folder, got none
    """

    def __init__(self, folder: str | Path, *, patch_size: int, max_patches: int, seed: int = 0):
        path = check_path("folder", folder)
        if not path.is_dir():
            raise ValueError(f"folder: expected a folder at {printable(path, 200)}, got none")
        found = labelled_files(path, check_int("seed", seed))
        limits = {"patch_size": patch_size, "max_patches": max_patches}
        self.train_images = AspectImages(found.train_files, **limits)
        self.train_labels = found.train_labels
        self.test_images = AspectImages(found.test_files, **limits)
        self.test_labels = found.test_labels
        self.class_names = found.class_names
        self.notes = found.notes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def look(self) -> None:
        """Decode every image once, so that a damaged one shows now, not mid-epoch.

        Raises:
            ValueError: an image cannot be decoded; the error names the file.
        """
        look_at((self.train_images, self.test_images))
