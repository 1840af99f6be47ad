"""The tensors that a checkpoint's index says to be divided among the files of several ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import shown

_ENTRIES: dict[str, type] = {"file": str, "bytes": int, "sha256": str}


def check_parts(index_file: Path, parts: object) -> None:
    """Raise ValueError unless an index's entry says which file each rank has written.

    Args:
        index_file: the index, for the error.
        parts: the entry. Whether a name is one of a checkpoint's tensors is not looked at.
    """
    for part in parts if type(parts) is list and parts else [None]:
        kinds = {name: type(value) for name, value in part.items()} if type(part) is dict else {}
        if kinds != _ENTRIES:
            raise ValueError(
                f"{index_file}: expected parts of {', '.join(_ENTRIES)}, got {shown(part)}"
            )


def joined(index_file: Path, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole tensors, of which the files of all ranks hold the rows one after another.

    Args:
        index_file: the index, for the error.
        parts: what the files hold, in the order of the ranks.

    Raises:
        ValueError: they are not parts of the same tensors.
    """
    found: dict[str, Tensor] = {}
    for name in sorted({name for part in parts for name in part}):
        rows: list[Any] = [part.get(name) for part in parts]
        kinds = {None if each is None else (each.dtype, each.shape[1:]) for each in rows}
        if len(kinds) > 1 or rows[0].dim() == 0:
            raise ValueError(f"{index_file}: expected {name} in like parts, got others")
        found[name] = torch.cat(rows)
    return found
