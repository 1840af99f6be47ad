"""Many paths in little memory, which worker processes share with the process that found them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor


class PackedPaths(Sequence[Path]):
    """An immutable sequence of paths, kept as the bytes of their names in one tensor.

    A forked process would copy the memory of every path object that it uses, since Python counts
    the uses inside of the object. The content of a tensor stays shared.
    """

    def __init__(self, paths: Iterable[str | Path]):
        names = [os.fsencode(path) for path in paths]
        self._text = torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8)
        self._ends = torch.tensor([0, *map(len, names)], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Path, ...]: ...

    def __getitem__(self, index: int | slice) -> Path | tuple[Path, ...]:
        """Return one path, or those of a slice."""
        places = range(len(self))[index]
        return self._path(places) if isinstance(places, int) else tuple(map(self._path, places))

    def __iter__(self) -> Iterator[Path]:
        return map(self._path, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedPaths):
            return NotImplemented
        return torch.equal(self._ends, other._ends) and torch.equal(self._text, other._text)

    __hash__ = None  # type: ignore[assignment]

    def _path(self, place: int) -> Path:
        start, end = self._ends[place : place + 2].tolist()
        name: Tensor = self._text[start:end]
        return Path(os.fsdecode(name.numpy().tobytes()))
