"""The files of a tar archive and where their bytes lie, from its headers alone.

Nothing is read of a file's own bytes, however large it is, so that one system call finds a header,
and mostly the next ones too where the files between them are small. tarfile, which knows more of
the format, takes several calls and objects for each.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from adatape_kernels.data.printable import printable

BLOCK = 512
"""Headers and files begin at multiples of so many bytes."""
# So many bytes hold the header of a small file, that file, and the next header, each of which may
# have another header of two blocks before it.
_WINDOW = 4096
_MOST_EXTRA_BYTES = 1 << 20
# Behind its end an archive is filled up with zeros to a multiple of so many bytes. Where more is
# there, it is looked at.
_RECORD = 10240
_MOST_TAIL_BYTES = 1 << 20
_SHOWN_CHARACTERS = 100
_EMPTY = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
# Links, devices, folders and pipes, behind whose headers no bytes of theirs lie.
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX, _PAX_OF_ALL = (b"x", b"X"), b"g"
_CHECKSUM = slice(148, 156)
_ADLER = 65521


class TarMember(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Where its bytes begin in the archive."""
    size: int
    """Number of these bytes."""


class _Unreadable(Exception):
    """Why a header cannot be read."""


class TarHeaders:
    """The regular files of an archive that is not compressed, in their order; a context.

    Folders, links and sparse files are skipped. Names may be as long as GNU's or POSIX's additional
    headers make them.

    Args:
        archive: the file, which stays open within the context.

    Raises:
        ValueError: it cannot be opened; the error names it.
    """

    def __init__(self, archive: Path):
        self.archive = archive
        self._last = "none"
        try:
            self._file = os.open(archive, os.O_RDONLY)
        except OSError as error:
            raise self._no_archive(error.strerror or str(error)) from None
        self._size = os.fstat(self._file).st_size
        if hasattr(os, "posix_fadvise"):
            # The system would read ahead of each header, into the bytes of files.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._begin, self._window = 0, b""

    def __enter__(self) -> "TarHeaders":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def content(self, member: TarMember) -> bytes:
        """Return the bytes of a file."""
        return self._bytes(member.offset, member.size)

    def __iter__(self) -> Iterator[TarMember]:
        """Yield the files.

        Raises:
            ValueError: this is no archive, a header is damaged, or the archive is cut short; the
                error names it and the last member that was found.
        """
        try:
            yield from self._members()
        except _Unreadable as error:
            raise self._no_archive(str(error)) from None
        except OSError as error:
            raise self._no_archive(error.strerror or str(error)) from None

    def _members(self) -> Iterator[TarMember]:
        of_all: dict[str, str] = {}
        of_next: dict[str, str] = {}
        place = 0
        while (header := self._bytes(place, BLOCK)) != _EMPTY:
            if len(header) < BLOCK and (place or not header):
                raise self._cut_short(self._last)
            _check_sum(header)
            kind, size = header[156:157], _number(header[124:136])
            place += BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_OF_ALL):
                extra = self._extra(place, size)
                if kind == _LONG_NAME:
                    of_next.setdefault("path", _text(extra))
                elif kind == _PAX_OF_ALL:
                    of_all |= _records(extra)
                elif kind in _PAX:
                    of_next = _records(extra) | of_next
                place += _padded(size)
                continue
            entries = of_all | of_next if of_all else of_next
            name, of_next = entries.get("path") or _name(header, kind), {}
            if "size" in entries:
                size = _decimal(entries["size"])
            self._last = name
            if kind in _WITHOUT_BYTES or (kind == b"\0" and name.endswith("/")):
                continue
            if kind == _SPARSE:
                place = self._behind_sparse_map(header, place)
            if place + size > self._size:
                raise self._cut_short(name)
            if kind in _REGULAR and not any(key.startswith("GNU.sparse.") for key in entries):
                yield TarMember(name, place, size)
            place += _padded(size)
        behind = self._window[place - self._begin :]
        if self._size - place > _RECORD:
            behind = self._bytes(place, _MOST_TAIL_BYTES)
        if behind.strip(b"\0"):
            raise _Unreadable("more behind its end, as archives have that were put together")

    def _bytes(self, place: int, size: int) -> bytes:
        """Return some bytes of the archive, fewer where it ends before."""
        start = place - self._begin
        if start < 0 or start + size > len(self._window):
            self._begin, start = place, 0
            self._window = os.pread(self._file, max(size, _WINDOW), place)
        return self._window[start : start + size]

    def _extra(self, place: int, size: int) -> bytes:
        """Return what an additional header says of the member behind it."""
        if size > _MOST_EXTRA_BYTES:
            raise _Unreadable(f"an additional header of {size} bytes")
        extra = self._bytes(place, size)
        if len(extra) < size:
            raise self._cut_short(self._last)
        return extra

    def _behind_sparse_map(self, header: bytes, place: int) -> int:
        """Return where the bytes of a sparse file begin, whose map may go on in further blocks."""
        goes_on = header[482]
        while goes_on:
            block = self._bytes(place, BLOCK)
            if len(block) < BLOCK:
                raise self._cut_short(self._last)
            goes_on, place = block[504], place + BLOCK
        return place

    def _no_archive(self, reason: str) -> ValueError:
        return ValueError(
            f"{printable(self.archive)}: expected a whole tar file, uncompressed, got "
            f"{_shown(reason)} (the last member before: {_shown(self._last)})"
        )

    def _cut_short(self, member: str) -> ValueError:
        return ValueError(
            f"{printable(self.archive)}: expected a whole tar file, got one that is cut short at "
            f"or behind the member {_shown(member)}"
        )


def _check_sum(header: bytes) -> None:
    """Raise _Unreadable where a header is not what its checksum says."""
    if len(header) < BLOCK:
        raise _Unreadable("a file without a header")
    # The checksum counts its own eight bytes as blanks.
    rest, expected = header[:148] + header[156:], _number(header[_CHECKSUM]) - 8 * 32
    # The lower half of Adler-32 is the sum of bytes and 1, which zlib computes fastest.
    if (zlib.adler32(rest) & 0xFFFF) == (expected + 1) % _ADLER:
        return
    # Old programs added bytes up as signed ones.
    if sum(rest) - 256 * sum(byte > 127 for byte in rest) != expected:
        raise _Unreadable("a header whose checksum is another")


def _number(field: bytes) -> int:
    """Return a number of a header, in octal digits or, of large ones, in base 256."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():
        raise _Unreadable("a header in which a number is none")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise _Unreadable("a header in which a number is none") from None


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Unreadable("an additional header in which a number is none")
    return int(text)


def _name(header: bytes, kind: bytes) -> str:
    """Return the name that a header has room for."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and kind != _SPARSE else name


def _records(extra: bytes) -> dict[str, str]:
    """Return the entries of a header of POSIX: of each its length, a blank, and KEY=VALUE."""
    found, place = {}, 0
    while place < len(extra) and extra[place]:
        digits = extra[place : place + 20].partition(b" ")[0]
        length = _decimal(digits.decode("latin-1"))
        record = extra[place + len(digits) + 1 : place + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 2 or record[-1:] != b"\n" or not equals:
            raise _Unreadable("an additional header that is damaged")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode(
            "utf-8", "surrogateescape"
        )
        place += length
    return found


def _text(field: bytes) -> str:
    return _decoded(field.partition(b"\0")[0])


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    """Return how many bytes a file takes with what fills its last block."""
    return -(-size // BLOCK) * BLOCK


def _shown(text: str) -> str:
    return printable(text, _SHOWN_CHARACTERS)
