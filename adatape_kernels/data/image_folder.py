"""Image sets of JPEG or PNG files, a folder for each class, decoded when a batch needs them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.data.image_set import ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_SHARE = 0.2
"""Share of each class that is for the test, where a folder has no train/."""
DECODERS = 2
"""Number of threads that decode; Pillow releases the interpreter's lock meanwhile."""


class FolderImages:
    """Image files that look like a uint8 tensor (n, 3, size, size), decoded on access.

    Memory holds no more than the images that were asked for. An image is turned upright, scaled so
    that its shorter side is `size` pixels, and cut to the square in its middle.
    """

    def __init__(self, files: Sequence[Path], size: int):
        self.files = tuple(files)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at indices (batch,).

        Raises:
            ValueError: a file is damaged or neither JPEG nor PNG; the error names it.
        """
        files = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(lambda file: decode(file, self.size), files))
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size).byte()


def image_folder(folder: Path, size: int, seed: int) -> ImageSet:
    """Find the images of a folder of classes.

    Args:
        folder: holds a folder of image files for each class; or it holds train/ and one of val/
            and test/, which each hold such folders.
        size: side in pixels of the square that images are brought to.
        seed: where there is no train/, decides which fifth of each class is for the test.

    Raises:
        ValueError: there are fewer than two classes, a class has no image or too few to split, or
            the test has other classes than the training.
        RuntimeError: Pillow is not installed.
    """
    _pillow()
    train = folder / "train"
    if train.is_dir():
        test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
        if test is None:
            raise ValueError(f"data-dir: expected val or test beside {train}, got neither")
        train_classes, test_classes = _classes(train), _classes(test)
        if list(train_classes) != list(test_classes):
            odd = min(set(train_classes) ^ set(test_classes))
            raise ValueError(
                f"data-dir: expected the same classes in {train} and {test}, got {odd!r} in one"
            )
    else:
        train_classes, test_classes = _split(folder, _classes(folder), seed)
    train_images, train_labels = _labelled(train_classes, size)
    test_images, test_labels = _labelled(test_classes, size)
    return ImageSet(train_images, train_labels, test_images, test_labels, tuple(train_classes))


def decode(file: Path, size: int) -> Tensor:
    """Return an image file as (3, size, size) uint8.

    Raises:
        ValueError: the file is damaged, too large, or neither JPEG nor PNG.
    """
    image_module, image_ops = _pillow()
    try:
        # Only these two decoders run, whatever format a file claims to have.
        with image_module.open(file, formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (size, size))
            upright = image_ops.exif_transpose(image).convert("RGB")
            square = image_ops.fit(upright, (size, size), image_module.Resampling.BILINEAR)
    except image_module.UnidentifiedImageError:
        raise ValueError(f"{file}: expected a JPEG or PNG image, got no readable one") from None
    except FileNotFoundError:
        raise ValueError(f"{file}: expected an image, got no such file") from None
    # Each decoder fails in a way of its own: over a cut file as OSError, a bad PNG as SyntaxError.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        image_module.DecompressionBombError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: expected a whole JPEG or PNG image, got {reason}") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class by its name, classes and files in alphabetical order."""
    classes = {}
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            files = sorted(f for f in inner.iterdir() if f.suffix.lower() in SUFFIXES)
            if not files:
                raise ValueError(f"data-dir: expected JPEG or PNG files in {inner}, got none")
            classes[inner.name] = files
    if len(classes) < 2:
        raise ValueError(
            f"data-dir: expected a folder for each of two or more classes in {folder}, "
            f"got {len(classes)}"
        )
    return classes


def _split(
    folder: Path, classes: dict[str, list[Path]], seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return training and test files by class; of every class at least one image goes to each."""
    generator = torch.Generator().manual_seed(seed)
    train, test = {}, {}
    for name, files in classes.items():
        if len(files) < 2:
            raise ValueError(
                f"data-dir: expected two or more images in {folder / name} to split, got one"
            )
        order = torch.randperm(len(files), generator=generator).tolist()
        cut = max(1, round(TEST_SHARE * len(files)))
        test[name] = sorted(files[index] for index in order[:cut])
        train[name] = sorted(files[index] for index in order[cut:])
    return train, test


def _labelled(classes: dict[str, list[Path]], size: int) -> tuple[FolderImages, Tensor]:
    """Return the images of all classes, class after class, and their labels (n,) int64."""
    files = [file for names in classes.values() for file in names]
    counts = torch.tensor([len(names) for names in classes.values()])
    return FolderImages(files, size), torch.arange(len(counts)).repeat_interleave(counts)


def _pillow() -> tuple[Any, Any]:
    """Return Pillow's modules Image and ImageOps. Raises RuntimeError where it is missing."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeError(
            "imagefolder: expected Pillow to be installed (pip install 'adatape-kernels[demo]')"
        ) from None
    return Image, ImageOps
