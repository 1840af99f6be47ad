"""CIFAR-10 in its published formats: the binary batches and the "python" (pickled) ones.

A pickle can run any code when it is loaded by Python. `pickled_batch` reads it instead, which knows
only what such a batch holds.
"""

from pathlib import Path

import torch
from torch import Tensor

from adatape_kernels.data.idx import CLASSES, check_labels
from adatape_kernels.data.image_set import ImageSet
from adatape_kernels.data.pickled_batch import PickledArray, parse_batch
from adatape_kernels.data.printable import printable

SHAPE = (3, 32, 32)
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_PIXELS = 3 * 32 * 32
# A batch has 31 MB; a file of all batches in one, written with escapes, would still fit.
_MOST_BYTES = 1 << 29
_MOST_SHOWN = 200
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"


def cifar10(folder: Path) -> ImageSet:
    """Load data_batch_1 to data_batch_5 and test_batch, all binary (.bin) or all python.

    Args:
        folder: holds the six files, or the archive's folder cifar-10-batches-bin or -py.

    Raises:
        ValueError: a file is missing, damaged or not what its name says.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images; the set's page.
    """
    for inner in (folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        if inner.is_dir():
            folder = inner
            break
    binary = any((folder / f"{name}.bin").is_file() for name in (*_TRAIN, _TEST))
    parts: list[Tensor] = []
    for names in (_TRAIN, (_TEST,)):
        files = [folder / (f"{name}.bin" if binary else name) for name in names]
        for file in files:
            if not file.is_file():
                or_binary = "" if binary else f" or {file.name}.bin"
                raise ValueError(
                    f"data-dir: expected {file.name}{or_binary} in {folder}, got no such file"
                )
        images, labels = zip(
            *((read_binary if binary else read_python)(f) for f in files), strict=True
        )
        parts += [torch.cat(images), torch.cat(labels)]
    train_images, train_labels, test_images, test_labels = parts
    return ImageSet(train_images, train_labels, test_images, test_labels, CLASS_NAMES)


def read_binary(file: Path) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 32, 32) uint8 and labels (n,) int64 of a binary batch.

    A batch consists of records: one byte for the label, then 1,024 bytes each of red, green and
    blue, row after row.

    Raises:
        ValueError: the file is cut, or a label is out of range.
    """
    data = _content(file)
    if not data or len(data) % (_PIXELS + 1):
        raise ValueError(
            f"{file}: expected whole records of {_PIXELS + 1} bytes, got {len(data)} bytes"
        )
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, _PIXELS + 1)
    check_labels(file, records[:, 0])
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0].long()


def read_python(file: Path) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 32, 32) uint8 and labels (n,) int64 of a python batch.

    Raises:
        ValueError: the file is cut, holds anything but the published dictionary, or a label is
            out of range.
    """
    content = _content(file)
    try:
        batch = parse_batch(content)
        for name in ("data", "labels"):
            if name not in batch:
                raise ValueError(f"no entry {name!r}")
        if not isinstance(batch["data"], PickledArray):
            raise ValueError("data that is not an array of unsigned bytes")
        shape, pixels = batch["data"].pixels()
    except ValueError as error:
        reason = printable(error, _MOST_SHOWN)
        raise ValueError(f"{file}: expected a CIFAR-10 batch, got {reason}") from None
    labels = batch["labels"]
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise ValueError(f"{file}: expected a list of integers as labels, got something else")
    if not labels or len(pixels) != len(labels) * _PIXELS:
        raise ValueError(
            f"{file}: expected {_PIXELS} bytes for each of {len(labels)} labels, got {len(pixels)}"
        )
    if shape not in ((len(labels), _PIXELS), (len(labels), *SHAPE)):
        raise ValueError(
            f"{file}: expected data of shape {(len(labels), _PIXELS)}, got {printable(shape, 80)}"
        )
    if min(labels) < 0 or max(labels) >= CLASSES:
        wrong = next(label for label in labels if not 0 <= label < CLASSES)
        raise ValueError(f"{file}: expected labels from 0 to {CLASSES - 1}, got {wrong}")
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, *SHAPE)
    return images, torch.tensor(labels)


def _content(file: Path) -> bytes:
    """Return a file's bytes, if they are no more than a batch may have."""
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{file}: expected at most {_MOST_BYTES} bytes, got {size}")
    with file.open("rb") as stream:
        return stream.read(size)
