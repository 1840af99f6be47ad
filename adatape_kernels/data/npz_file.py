"""The arrays of an .npz file, each read when it is asked for, in memory that the file justifies.

An .npz file is a zip archive, with an .npy file for each array: a short header and the elements.
Both can promise far more than they hold. Here the header of an array is read first, so that a
caller can compare its shape; the elements take memory only as they arrive, and all that is read of
a file together is limited by the file's size. Nothing is unpickled.
"""

import contextlib
import copy
import io
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple

import numpy as np

from adatape_kernels.arguments import check_path
from adatape_kernels.data.printable import printable

FREE_BYTES = 1 << 28
"""What may be read of any file, however small it is."""
MOST_INFLATION = 16
"""How many times its size may be read of a larger file; float32 parameters shrink by a tenth."""

_MOST_DIRECTORY_BYTES = 1 << 22
_MOST_HEADER_BYTES = 10_000
_MOST_AXES = 32
_CHUNK_BYTES = 1 << 20
_SHOWN = 100
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,30})', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? *\}\s*"
)
# Truth values, integers, floating-point numbers, complex ones, texts.
_DTYPE = re.compile(rb"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[US][0-9]{1,8})")


class UnreadableFile(ValueError):
    """A file is not what it should be; the message names it."""


class ArrayHeader(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    """How elements follow each other: "C", the last axis first, or "F", the first axis first."""

    @property
    def nbytes(self) -> int:
        """Number of bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile(Mapping[str, np.ndarray]):
    """An open .npz file as a mapping from names to arrays; it closes as a context.

    Raises:
        UnreadableFile: the file is missing, cut, or no .npz file; so do its methods where an array
            is damaged, of another kind than numbers and texts, or too large for its file.

    The example reads a file of the repository, from the folder of a clone.

    Example:
        >>> from adatape_kernels.data.npz_file import NpzFile
        >>> with NpzFile("tests/golden/vit_input_token.npz") as arrays:
        ...     print(arrays.header("logits").shape, arrays["logits"].shape)
        (4, 7) (4, 7)
    """

    def __init__(self, path: str | Path):
        self.path = check_path("path", path)
        self._read_bytes: dict[str, int] = {}
        with self._naming():
            if not self.path.is_file():
                raise ValueError("no file" if self.path.exists() else "no such file")
            self._most_bytes = max(FREE_BYTES, MOST_INFLATION * self.path.stat().st_size)
            stream = _DirectoryReader(io.FileIO(self.path))
            try:
                self._zip = zipfile.ZipFile(stream)
                self._entries = _entries(self._zip)
            except BaseException:
                stream.close()
                raise
            self._stream = stream

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()
        self._stream.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        """Read an array. Raises KeyError where there is none of this name."""
        entry = self._entries[name]
        with self._naming(name), self._opened(entry) as stream:
            header = _header(stream, entry)
            self._read_bytes[name] = header.nbytes
            if sum(self._read_bytes.values()) > self._most_bytes:
                raise ValueError(f"arrays of more than {self._most_bytes} bytes")
            content = bytearray()
            while chunk := stream.read(_CHUNK_BYTES):
                content += chunk
            if len(content) != header.nbytes:
                raise ValueError(f"{len(content)} bytes instead of {header.nbytes}")
            array = np.frombuffer(content, header.dtype)
            return array.reshape(header.shape, order=header.order)

    def header(self, name: str) -> ArrayHeader:
        """Read shape and dtype of an array. Raises KeyError where there is none of this name."""
        entry = self._entries[name]
        with self._naming(name), self._opened(entry) as stream:
            return _header(stream, entry)

    def below(self, prefix: str) -> "NpzFile":
        """Return those arrays whose names begin with a prefix; the file stays shared."""
        view = copy.copy(self)
        view._entries = {n: entry for n, entry in self._entries.items() if n.startswith(prefix)}
        return view

    def _opened(self, entry: zipfile.ZipInfo) -> IO[bytes]:
        """Open an entry, if it is stored as it is or deflated; others may take any memory."""
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"the compression {entry.compress_type}")
        return self._zip.open(entry)

    @contextlib.contextmanager
    def _naming(self, name: str | None = None) -> Iterator[None]:
        """Turn whatever is raised over a file into one line that names it.

        A file that was made to be wrong can make zipfile raise NotImplementedError, RuntimeError,
        struct.error, UnicodeDecodeError, OverflowError and more.
        """
        try:
            yield
        except Exception as error:
            inside = "" if name is None else f" in {printable(name, _SHOWN)}"
            reason = printable(getattr(error, "strerror", None) or error, 2 * _SHOWN)
            raise UnreadableFile(
                f"{printable(self.path)}: expected a readable .npz file, "
                f"got: {reason or type(error).__name__}{inside}"
            ) from None


class _DirectoryReader(io.BufferedReader):
    """A file that refuses the one large read of zipfile, that of an archive's directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        if size is not None and size > _MOST_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(size)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return what the archive holds, by the names of the arrays."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name in entries:
            raise ValueError(f"two entries {printable(name, _SHOWN)}")
        entries[name] = entry
    return entries


def _header(stream: IO[bytes], entry: zipfile.ZipInfo) -> ArrayHeader:
    """Read the header of an array, and compare it with the size that its entry states."""
    start = stream.read(8)
    if start not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0", b"\x93NUMPY\3\0"):
        raise ValueError("no array")
    length = stream.read(2 if start[6] == 1 else 4)
    size = int.from_bytes(length, "little")
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    text = stream.read(size)
    parsed = _HEADER.fullmatch(text)
    if parsed is None:
        raise ValueError("a header of another form")
    descr, fortran, axes = parsed.groups()
    if not _DTYPE.fullmatch(descr):
        raise ValueError(f"an array of the type {descr.decode('latin-1')}")
    digits = re.findall(rb"[0-9]+", axes)
    if len(digits) > _MOST_AXES or any(len(length) > 18 for length in digits):
        raise ValueError(f"a shape of {len(digits)} axes, ({axes.decode()[:_SHOWN]})")
    header = ArrayHeader(
        tuple(map(int, digits)), np.dtype(descr.decode()), "F" if fortran == b"True" else "C"
    )
    stated = entry.file_size - len(start) - len(length) - size
    if header.nbytes != stated:
        raise ValueError(f"{stated} bytes for a shape of {header.nbytes} bytes")
    return header
