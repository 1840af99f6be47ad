"""Folders of JPEG or PNG files, one folder a class, decoded when a batch asks for them."""

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
# Pillow lets go of the interpreter while it decodes, so threads suffice; more gain nothing here.
DECODERS = 2


class FolderImages:
    """Image files as (n, 3, size, size) uint8, decoded on access: memory holds one batch.

    An image is turned upright, scaled so that its shorter side is `size`, and cut to the square
    in its middle.
    """

    def __init__(self, files: Sequence[Path], size: int):
        self.files = tuple(files)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at indices (batch,).

        Raises:
            ValueError: a file is damaged or neither JPEG nor PNG; names it.
        """
        files = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(lambda file: decode(file, self.size), files))
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size).byte()


def image_folder(folder: Path, size: int, seed: int) -> ImageSet:
    """Find the images of a folder of classes.

    Args:
        folder: holds a folder for each class, or train/ and one of val/ and test/ that each do.
        size: side of the square that images are brought to, in pixels.
        seed: of the split, a fifth of each class for the test, where there is no train/.

    Raises:
        ValueError: no classes, a class without an image, or other classes in test than in train.
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
        # Only these two decoders run, whatever a file says it is.
        with image_module.open(file, formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (size, size))
            upright = image_ops.exif_transpose(image).convert("RGB")
            square = image_ops.fit(upright, (size, size), image_module.Resampling.BILINEAR)
    except image_module.UnidentifiedImageError:
        raise ValueError(f"{file}: expected a JPEG or PNG image, got no readable one") from None
    except FileNotFoundError:
        raise ValueError(f"{file}: expected an image, got no such file") from None
    # Damaged files fail in the decoders' own ways: a cut one as OSError, a bad PNG as SyntaxError.
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
    """Return the image files of each class, by the class's name, both in order."""
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
    """Split every class by the same share, at least one image each way."""
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
    files = [file for names in classes.values() for file in names]
    counts = torch.tensor([len(names) for names in classes.values()])
    return FolderImages(files, size), torch.arange(len(counts)).repeat_interleave(counts)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeError(
            "imagefolder: expected Pillow to be installed (pip install 'adatape-kernels[demo]')"
        ) from None
    return Image, ImageOps
