"""checkpoint.json, the index of a run's checkpoint: what it holds, its SHA-256, and its checks."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.recipes.distributed.checkpoint_parts import check_parts

FORMATS = {f"adatape-kernels training checkpoint, {number}": number for number in (1, 2, 3)}
"""The formats that can be read, by what checkpoint.json calls them; the last two are written."""
FORMAT, DIVIDED_FORMAT = list(FORMATS)[1:]
INDEX = "checkpoint.json"

_TENSORS = re.compile(r"checkpoint-[0-9]+(-[0-9a-f]{8})?\.safetensors")
# The end of checkpoint.json. The SHA-256 is that of the file with zeros in its place.
_SEAL = re.compile(rb'"sha256 of this file": "([0-9a-f]{64})"\n\}\n\Z')
_SEALED = "sha256 of this file"


def files_of(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that hold an index's tensors."""
    return [index["file"], *(part["file"] for part in index.get("parts", ()))]


def current_files(folder: Path) -> list[str]:
    """Return the names of the tensors' files of a folder's checkpoint; none where there is none.

    Raises:
        ValueError: checkpoint.json is damaged.
    """
    try:
        return files_of(read_index(folder))
    except FileNotFoundError:
        return []


def read_index(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder's checkpoint.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return parsed(folder / INDEX, content_of(folder / INDEX))


def sealed(index: Mapping[str, Any]) -> bytes:
    """Return the content of checkpoint.json, which holds a SHA-256 of itself."""
    content = (json.dumps({**index, _SEALED: 64 * "0"}, indent=1) + "\n").encode()
    found = _SEAL.search(content)
    assert found is not None
    return _with_digest(content, found, hashlib.sha256(content).hexdigest().encode())


def _with_digest(content: bytes, found: re.Match[bytes], digest: bytes) -> bytes:
    return content[: found.start(1)] + digest + content[found.end(1) :]


def epoch_of(folder: Path) -> int | None:
    """Return the epoch whose checkpoint a folder holds; None where it holds none that is whole."""
    try:
        return read_index(folder)["epoch"]
    except (FileNotFoundError, ValueError):
        return None


def content_of(file: Path) -> bytes:
    """Return a file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; the error names it.
    """
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file}: expected a file, got something else")
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{file}: expected a file that can be read, got {error.strerror}"
        ) from None


def parsed(index_file: Path, content: bytes) -> dict[str, Any]:
    """Return the entries of checkpoint.json.

    Raises:
        ValueError: it is cut, altered or of another format; the error names the file.
    """
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["too deep a nesting"])[0]
        raise ValueError(f"{index_file}: expected whole JSON, got {reason}") from None
    came = index.get("format") if isinstance(index, dict) else None
    if not isinstance(came, str) or came not in FORMATS:
        raise ValueError(f"{index_file}: expected the format {FORMAT!r}, got {shown(came)}")
    # An altered byte may also make it look like format 1, in which there is no such entry.
    if FORMATS[came] > 1 or _SEALED in index:
        found = _SEAL.search(content)
        whole = b"" if found is None else _with_digest(content, found, 64 * b"0")
        if found is None or hashlib.sha256(whole).hexdigest().encode() != found[1]:
            raise ValueError(f"{index_file}: expected its own SHA-256, got that of another content")
    for name, kind in {**_ENTRIES, **OPTIONAL_ENTRIES}.items():
        if name in OPTIONAL_ENTRIES and name not in index:
            continue
        if type(index.get(name)) is not kind or (name in OPTIONAL_ENTRIES and not index[name]):
            raise ValueError(
                f"{index_file}: expected {name} of type {kind.__name__}, "
                f"got {shown(index.get(name))}"
            )
    if FORMATS[came] == 3:
        check_parts(index_file, index.get("parts"))
    else:
        index.pop("parts", None)
    # The name comes from a file, which must not make us read outside of the folder.
    for name in files_of(index):
        if not _TENSORS.fullmatch(name):
            raise ValueError(
                f"{index_file}: expected file of the form checkpoint-N.safetensors, "
                f"got {shown(name)}"
            )
    for name in ("epoch", "step", "bytes"):
        if index[name] < 0:
            raise ValueError(f"{index_file}: expected {name} of 0 or more, got {index[name]}")
    if index["epoch"] != len(index["history"]):
        raise ValueError(
            f"{index_file}: expected epoch to be the length of history, {len(index['history'])}, "
            f"got {shown(index['epoch'])}"
        )
    return index


_ENTRIES: dict[str, type] = {
    "file": str,
    "bytes": int,
    "sha256": str,
    "epoch": int,
    "step": int,
    "config": dict,
    "data": dict,
    "history": list,
    "environment": dict,
}
KEPT_ENTRIES = ("epoch", "step", "config", "data", "history", "environment")
# Entries that runs of earlier versions lack, and that are written where there is something to say.
OPTIONAL_ENTRIES: dict[str, type] = {"extended": list, "best": dict}
