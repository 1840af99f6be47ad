"""Image sets from local files in their published formats; nothing is downloaded."""

from pathlib import Path

from adatape_kernels.data.aspect_folder import AspectFolder, AspectImages, aspect_grid
from adatape_kernels.data.cifar10 import cifar10
from adatape_kernels.data.digits import digits
from adatape_kernels.data.idx import DIGIT_CLASSES, FASHION_CLASSES, mnist_layout
from adatape_kernels.data.image_folder import image_folder
from adatape_kernels.data.image_set import ImageSet, Normaliser
from adatape_kernels.data.packing import packed_batches, packed_indices
from adatape_kernels.data.preprocessing import Preprocessing
from adatape_kernels.data.printable import printable
from adatape_kernels.data.shards import shard_set

__all__ = [
    "NAMES",
    "AspectFolder",
    "AspectImages",
    "ImageSet",
    "Normaliser",
    "Preprocessing",
    "aspect_grid",
    "digits",
    "load",
    "packed_batches",
    "packed_indices",
]

NAMES = ("digits", "fashion-mnist", "mnist", "cifar10", "imagefolder", "shards")
"""The image sets that `load` knows."""

# The folder that Debian's package dataset-fashion-mnist installs its files in.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load(
    name: str, folder: str | Path | None = None, *, image_size: int = 64, seed: int = 0
) -> ImageSet:
    """Load an image set.

    Args:
        name: one of NAMES.
        folder: the folder that holds the set's files. It may be None for digits, which have no
            files, and for fashion-mnist where Debian's package dataset-fashion-mnist is installed.
        image_size: side in pixels that the images of an imagefolder or of shards are brought to.
        seed: decides which images are for the test, where the files themselves do not.

    Raises:
        ValueError: the name is unknown, or the folder's content is not what the name says.
        RuntimeError: a package that this set needs is missing.
        OSError: a file cannot be read.

    Example:
        >>> from adatape_kernels.data import load
        >>> digits = load("digits")
        >>> digits.train_images.shape, digits.num_classes
        (torch.Size([1437, 1, 8, 8]), 10)
    """
    if name not in NAMES:
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        if folder is not None:
            raise ValueError(f"data-dir: expected none for digits, got {folder}")
        return digits(seed)
    if folder is None and name == "fashion-mnist" and FASHION_MNIST_FOLDER.is_dir():
        folder = FASHION_MNIST_FOLDER
    if folder is None:
        raise ValueError(f"data-dir: expected the folder that holds {name}, got none")
    folder = Path(folder)
    try:
        came = "" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
    except OSError as error:
        came = error.strerror or str(error)
    if came:
        raise ValueError(f"data-dir: expected a folder at {printable(folder, 200)}, got {came}")
    if name == "cifar10":
        return cifar10(folder)
    if name == "imagefolder":
        return image_folder(folder, image_size, seed)
    if name == "shards":
        return shard_set(folder, image_size, seed)
    return mnist_layout(folder, FASHION_CLASSES if name == "fashion-mnist" else DIGIT_CLASSES)
