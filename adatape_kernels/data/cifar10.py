"""CIFAR-10 in its published formats: the binary batches and the "python" (pickled) ones.

A pickle can run any code when it is loaded. The python batches are therefore read by an unpickler
that builds numbers, bytes, lists and dictionaries only. For a numpy array it keeps the arguments
that numpy would have been called with, and calls nothing. Any other class or function that the
file names is refused.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.data.idx import CLASSES, check_labels
from adatape_kernels.data.image_set import ImageSet

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
    data = file.read_bytes()
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
    with file.open("rb") as stream:
        try:
            batch = _InertUnpickler(stream, encoding="bytes").load()
            pixels, labels = batch[b"data"].content(), batch[b"labels"]
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file}: expected a CIFAR-10 batch, got {_line(error)}") from None
        # A cut or made-up pickle makes the unpickler's operations fail in any of these ways.
        except (
            EOFError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            MemoryError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{file}: expected a CIFAR-10 batch, got {type(error).__name__}: {_line(error)}"
            ) from None
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise ValueError(f"{file}: expected a list of integers as labels, got something else")
    if not labels or len(pixels) != len(labels) * _PIXELS:
        raise ValueError(
            f"{file}: expected {_PIXELS} bytes for each of {len(labels)} labels, got {len(pixels)}"
        )
    if min(labels) < 0 or max(labels) >= CLASSES:
        wrong = next(label for label in labels if not 0 <= label < CLASSES)
        raise ValueError(f"{file}: expected labels from 0 to {CLASSES - 1}, got {wrong}")
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, *SHAPE)
    return images, torch.tensor(labels)


class _InertUnpickler(pickle.Unpickler):
    """Builds plain containers, and stand-ins for numpy arrays; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for one of the three names of numpy that a batch uses."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _ArrayStandIn
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _DtypeStandIn
        raise pickle.UnpicklingError(f"the forbidden name {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside the file."""
        raise pickle.UnpicklingError("a reference to an object outside the file")


class _DtypeStandIn:
    """Stands for a numpy.dtype, and for the class numpy.ndarray where it is an argument."""

    __slots__ = ("code",)

    def __init__(self, code: object = None, *rest: object):
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and flags, which do not matter to single bytes."""


class _ArrayStandIn:
    """Stands for an array; holds the state that numpy would have rebuilt it from."""

    __slots__ = ("state",)

    def __init__(self, *arguments: object):
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        """Keep the state: version, shape, dtype, whether it is in column-major order, bytes."""
        self.state = state

    def content(self) -> bytes:
        """Return the bytes of a uint8 array in row-major order; raise ValueError for others."""
        match self.state:
            case (int(), tuple(), _DtypeStandIn(code=b"u1" | "u1"), False | 0, bytes() as content):
                return content
        raise ValueError("data that is not an array of unsigned bytes")


def _line(error: Exception) -> str:
    """Return an error's first line; an end of file has none."""
    return (str(error).splitlines() or ["a cut file"])[0]
