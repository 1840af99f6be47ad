"""A suite: everything that is measured of one op, and how its shapes are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Case

PATTERNS = ("zero", "full", "uniform", "skewed")
"""Tape lengths: all 0, all T, uniform in 0 to T, or 90 % short (T // 10) and 10 % T."""


class Selection(NamedTuple):
    """The shapes that are measured unless `--shape` names others."""

    quick: Sequence[str]
    default: Sequence[str]
    sweep: Sequence[str]
    scaling: Sequence[str] = ()
    """Sizes in a row, for plots: part of the default, without providers that are compiled."""


@dataclass(frozen=True)
class Suite:
    """One op with its shapes, directions and cases."""

    op: str
    shape: Any
    """A named tuple whose fields are the shape's letters, with their defaults."""
    directions: Sequence[str]
    providers: Sequence[str]
    """Every name that a case may have, on any machine."""
    shapes: Callable[[str], Selection]
    """Takes the type of the device."""
    dtypes: Callable[[str], Sequence[torch.dtype]]
    """Those measured by default, by the type of the device."""
    case: Callable[[Any, str, torch.dtype, str], Case]
    """Takes a shape, a direction, a dtype and the type of the device."""
    check: Callable[[Any], None] = lambda shape: None
    """Raises ValueError where a shape's values contradict one another."""

    def parse(self, text: str) -> Any:
        """Return a shape from text as in the CSV files, as "B=16 N=196"; the rest by default.

        Raises:
            ValueError: an unknown letter, or a value out of range.
        """
        kinds = self.shape.__annotations__
        values: dict[str, Any] = {}
        for part in text.replace(",", " ").split():
            name, _, value = part.partition("=")
            if name not in kinds or not value:
                letters = " ".join(f"{each}=…" for each in kinds)
                raise ValueError(f"shape: expected {letters} for {self.op}, got {part!r}")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                raise ValueError(
                    f"shape: expected {kinds[name].meaning} for {name}, got {value!r}"
                ) from None
        shape = self.shape(**values)
        self.check(shape)
        return shape


def label(shape: Any) -> str:
    """Return a shape as text, which `Suite.parse` takes."""
    return " ".join(f"{name}={value}" for name, value in shape._asdict().items())


class Size(int):
    """A whole number of at least 1."""

    meaning = "a whole number from 1 on"

    def __new__(cls, value: object) -> "Size":
        number = super().__new__(cls, value)
        if number < 1:
            raise ValueError(value)
        return number


class Positive(float):
    """A number above 0, written without a fraction where it has none."""

    meaning = "a number above 0"

    def __new__(cls, value: object) -> "Positive":
        number = super().__new__(cls, value)
        if not number > 0:
            raise ValueError(value)
        return number

    def __str__(self) -> str:
        return f"{float(self):g}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class Span(str):
    """A number of rows, or the least and the most, as "50-256"."""

    meaning = "a number or two, as in 50-256"

    def __new__(cls, value: object) -> "Span":
        text = super().__new__(cls, value)
        low, high = text.bounds
        if not 0 <= low <= high:
            raise ValueError(value)
        return text

    @property
    def bounds(self) -> tuple[int, int]:
        low, _, high = self.partition("-")
        return int(low), int(high or low)

    def lens(self, batch: int) -> list[int]:
        """Return so many lengths, evenly spread in a random order."""
        low, high = self.bounds
        spread = torch.linspace(low, high, batch).round().long()
        return spread[torch.randperm(batch)].tolist()


class Tape(str):
    """Tape lengths: a pattern's name, or a number that every example has."""

    meaning = f"{', '.join(PATTERNS)} or a number"

    def __new__(cls, value: object) -> "Tape":
        text = super().__new__(cls, value)
        if text not in PATTERNS and not text.isdecimal():
            raise ValueError(value)
        return text

    def lens(self, batch: int, most: int) -> list[int]:
        """Return each example's number of tape tokens, in a random order."""
        if self.isdecimal():
            return [min(int(self), most)] * batch
        if self == "skewed":
            short = most // 10
            spread = [most if 10 * i < batch else short for i in range(batch)]
        elif self == "uniform":
            spread = torch.linspace(0, most, batch).round().long().tolist()
        else:
            spread = [most if self == "full" else 0] * batch
        return [spread[i] for i in torch.randperm(batch).tolist()]


def for_reading(device_type: str) -> Sequence[torch.dtype]:
    """Return the dtypes that selection is measured in: float32, and on a GPU bfloat16 too."""
    return (torch.float32, torch.bfloat16) if device_type == "cuda" else (torch.float32,)


def for_products(device_type: str) -> Sequence[torch.dtype]:
    """Return bfloat16 on a GPU; on a processor float32, and bfloat16 if its products have it."""
    if device_type == "cuda":
        return (torch.bfloat16,)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if native else (torch.float32,)
