"""MNIST and Fashion-MNIST in their published format, idx, compressed or not."""

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.data.image_set import ImageSet

SIDE = 28
CLASSES = 10
FASHION_CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "trainer",
    "bag",
    "boot",
)
DIGIT_CLASSES = tuple(str(digit) for digit in range(CLASSES))

_UNSIGNED_BYTES = 8
# Images have three axes, and the largest published set 638 MB; a header of more is damaged.
_MOST_AXES = 8
_MOST_BYTES = 1 << 30
# MNIST's largest file has 47 MB. A compressed file may become larger than this only by a factor
# that images reach: up to 10 where they are not of one colour, and 1,000 in a file made to be one.
_MOST_INFLATED_BYTES = 1 << 27
_MOST_INFLATION = 50
_CHUNK_BYTES = 1 << 20


def mnist_layout(folder: Path, class_names: tuple[str, ...]) -> ImageSet:
    """Load images (1, 28, 28) uint8 from the four files that MNIST consists of.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each as it is or compressed (.gz).
        class_names: names of the labels 0 to 9.

    Raises:
        ValueError: a file is missing, damaged or not what its name says.

    Source: LeCun et al., the MNIST database; Xiao et al., Fashion-MNIST.
    """
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        images_file, labels_file = _find(folder, part, "images"), _find(folder, part, "labels")
        images, labels = read_idx(images_file), read_idx(labels_file)
        if images.dim() != 3 or images.shape[1:] != (SIDE, SIDE):
            raise ValueError(
                f"{images_file}: expected images of (n, {SIDE}, {SIDE}), got {tuple(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{labels_file}: expected {len(images)} labels, one for each image of "
                f"{images_file.name}, got {tuple(labels.shape)}"
            )
        if not len(labels):
            raise ValueError(f"{images_file}: expected images, got none")
        check_labels(labels_file, labels)
        parts += [images.unsqueeze(1), labels.long()]
    train_images, train_labels, test_images, test_labels = parts
    return ImageSet(train_images, train_labels, test_images, test_labels, class_names)


def check_labels(file: Path, labels: Tensor) -> None:
    """Raise ValueError unless every label is one of the ten classes."""
    wrong = (labels >= CLASSES).nonzero()
    if len(wrong):
        image = int(wrong[0])
        raise ValueError(
            f"{file}: expected labels from 0 to {CLASSES - 1}, got {int(labels[image])} "
            f"for image {image}"
        )


def read_idx(file: Path) -> Tensor:
    """Read an idx file of unsigned bytes, as it is or compressed (.gz), as a uint8 tensor.

    Such a file consists of two zero bytes, the type of the elements (8), the number of axes, the
    length of each axis as a big-endian number of 4 bytes, and the elements.

    Raises:
        ValueError: the file is of another format, cut or too long.

    Source: the description of the format at the end of the MNIST database's page.
    """
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                return _parse(file, stream)
        with file.open("rb") as plain:
            return _parse(file, plain)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: expected a whole gzip file, got {error}") from None


def _parse(file: Path, stream: BinaryIO | gzip.GzipFile) -> Tensor:
    """Read an uncompressed stream; `file` is its name in errors."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTES or not magic[3]:
        raise ValueError(
            f"{file}: expected an idx file of unsigned bytes (first bytes 00 00 08), "
            f"got {magic.hex(' ') or 'an empty file'}"
        )
    if magic[3] > _MOST_AXES:
        raise ValueError(f"{file}: expected up to {_MOST_AXES} axes, got {magic[3]}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{file}: expected {magic[3]} axes after the first bytes, got a cut file")
    shape = [int(length) for length in np.frombuffer(header, ">u4")]
    total = int(np.prod(shape, dtype=object))
    stored = file.stat().st_size
    most = _MOST_BYTES
    if file.suffix == ".gz":
        most = min(most, max(_MOST_INFLATED_BYTES, _MOST_INFLATION * stored))
    if total > most:
        raise ValueError(f"{file}: expected at most {most} bytes, got axes {shape}")
    if not total:
        raise ValueError(f"{file}: expected elements, got axes {shape}")
    data = _read(stream, total + 1)
    if len(data) != total:
        came = "more" if len(data) > total else f"{len(data)}"
        raise ValueError(f"{file}: expected {total} bytes for axes {shape}, got {came}")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def _read(stream: BinaryIO | gzip.GzipFile, most: int) -> bytearray:
    """Return what a stream still has, up to `most` bytes; memory is taken as bytes arrive."""
    data = bytearray()
    while len(data) < most and (chunk := stream.read(min(_CHUNK_BYTES, most - len(data)))):
        data += chunk
    return data


def _find(folder: Path, part: str, kind: str) -> Path:
    """Return a file of one part, "train" or "t10k", under any of the names it is published by."""
    axes = 3 if kind == "images" else 1
    names = [f"{part}-{kind}-idx{axes}-ubyte", f"{part}-{kind}.idx{axes}-ubyte"]
    for name in (*names, *(f"{name}.gz" for name in names)):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"data-dir: expected {names[0]} or {names[0]}.gz in {folder}, got no such file"
    )
