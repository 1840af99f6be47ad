"""Where the images of a tar shard lie and what their labels are, from one pass over its headers.

A shard has WebDataset's layout: members whose names are equal up to the first dot of the last part,
and which stand beside each other, are one example. It has one image, NAME.jpg or another of
`image_file.SUFFIXES`, and one label: NAME.cls, an integer as text, or NAME.json, an object with an
integer "label". Members of other types are skipped. None is unpacked, and nothing is unpickled.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adatape_kernels.data.image_file import MOST_FILE_BYTES, SUFFIXES
from adatape_kernels.data.printable import printable
from adatape_kernels.data.tar_headers import TarHeaders, TarMember

MOST_CLASSES = 1 << 20
"""Most classes that labels may be of where no file names the classes."""
_MOST_LABEL_BYTES = 1 << 20
_SHOWN_CHARACTERS = 100
_LABELS = (".cls", ".json")
_INTEGER = re.compile(rb"[+-]?[0-9]{1,18}")


class Example(NamedTuple):
    """An image of a shard and its label."""

    offset: int
    """Where the image's bytes begin in the shard."""
    size: int
    """Number of these bytes."""
    label: int


class _Open:
    """An example whose members are being read."""

    def __init__(self, key: str):
        self.key = key
        self.image: TarMember | None = None
        self.label: int | None = None


def examples_of(shard: Path, num_classes: int | None) -> Iterator[Example]:
    """Yield the examples of a shard in their order.

    Args:
        shard: a tar file that is not compressed.
        num_classes: number of classes; None where no file names them.

    Raises:
        ValueError: the shard is no tar file, is cut short, or a member is none that its layout
            has; the error names the shard, and the member if it is one.
    """
    most = MOST_CLASSES if num_classes is None else num_classes
    example: _Open | None = None
    with TarHeaders(shard) as headers:
        for member in headers:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if not stem:  # a hidden file
                continue
            key = f"{folder}{slash}{stem}"
            if example is None or example.key != key:
                if example is not None:
                    yield from _closed(shard, example)
                example = _Open(key)
            _take(shard, headers, member, f"{dot}{ending}".lower(), example, most)
    if example is not None:
        yield from _closed(shard, example)


def _take(
    shard: Path,
    headers: TarHeaders,
    member: TarMember,
    ending: str,
    example: _Open,
    num_classes: int,
) -> None:
    """Note what a member says of its example."""
    if ending in SUFFIXES:
        if example.image is not None:
            raise _wrong(shard, member.name, "one image for each example", "a second")
        if member.size > MOST_FILE_BYTES:
            raise _too_large(shard, member, MOST_FILE_BYTES)
        example.image = member
    elif ending in _LABELS:
        if example.label is not None:
            raise _wrong(shard, member.name, "one label for each example", "a second")
        if member.size > _MOST_LABEL_BYTES:
            raise _too_large(shard, member, _MOST_LABEL_BYTES)
        content = headers.content(member)
        label = _integer(content) if ending == ".cls" else _label_of_json(content)
        if label is None:
            expected = "an integer" if ending == ".cls" else 'an object with an integer "label"'
            raise _wrong(shard, member.name, expected, _shown(content.decode("utf-8", "replace")))
        if not 0 <= label < num_classes:
            raise _wrong(shard, member.name, f"a label of 0 to {num_classes - 1}", str(label))
        example.label = label


def _integer(content: bytes) -> int | None:
    text = content.strip()
    return int(text) if _INTEGER.fullmatch(text) else None


def _label_of_json(content: bytes) -> int | None:
    try:
        label = json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return label if type(label) is int else None


def _closed(shard: Path, example: _Open) -> Iterator[Example]:
    """Yield an example all of whose members were read; nothing where it is neither."""
    image, label = example.image, example.label
    if image is not None and label is not None:
        yield Example(image.offset, image.size, label)
    elif image is not None:
        raise _wrong(shard, image.name, "a label beside it, .cls or .json", "none")
    elif label is not None:
        raise _wrong(shard, f"{example.key}.*", "an image beside the label", "none")


def _too_large(shard: Path, member: TarMember, most: int) -> ValueError:
    return _wrong(shard, member.name, f"up to {most} bytes", f"{member.size} bytes")


def _wrong(shard: Path, member: str, expected: str, came: str) -> ValueError:
    return ValueError(f"{printable(shard)}: {_shown(member)}: expected {expected}, got {came}")


def _shown(text: str) -> str:
    return printable(text, _SHOWN_CHARACTERS)
