"""A suite is everything that is measured of one op; here is also how its shapes are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from adatape_kernels.benchmarks.harness.cases import BenchmarkCase
from adatape_kernels.op_types import ACTIVATIONS

PATTERNS = ("zero", "full", "uniform", "skewed")
"""Tape lengths are all 0, all T, spread evenly from 0 to T, or T // 10 with T for one in ten."""

LEGEND = {
    "B": "examples in the batch",
    "N": "input rows of an example: a number, or a span as 50-256",
    "T": "num_tape_tokens, the most tape tokens that an example may read",
    "tape": "tape tokens read: zero, full (T), uniform (0 to T), skewed (T for one example in ten, "
    "T // 10 for the others), a number, or tau (as the halting scores decide)",
    "M": "bank_size, the tokens of the bank",
    "bank": "input (each example has its own bank) or learn (all share one)",
    "D": "dim, the features of a token",
    "K": "key_dim, the features of a query and of a key",
    "k": "topk, the bank tokens that are merged into one tape token",
    "tau": "halt_threshold: an example reads on while its halting score is below it",
    "H": "num_heads of the attention",
    "d": "head_dim, the features of a head",
    "F": "hidden features of the feed-forward for input rows",
    "G": "hidden features of the feed-forward for tape rows",
    "act": "activation of the feed-forward for input rows: gelu_tanh, gelu or relu; gelu_tanh, the "
    "model's own, is left out",
    "V": "size and patch of the ViT, as S/16",
    "kept": "percent of the rows that are kept",
    "model": "avit (tokens halt) or uvit (examples halt)",
    "halted": "percent of the layers that tokens or examples are spared on average, or uniform: as "
    "many run one layer as two, and so on to all",
    "op": "the op that is called",
}
"""The meaning of each letter of a shape, the same as in the definition (SPEC)."""


def legend(letters: Sequence[str] = tuple(LEGEND)) -> list[str]:
    """Return a line for each of these letters, in the order of LEGEND."""
    return [f"{letter}: {text}" for letter, text in LEGEND.items() if letter in letters]


class Selection(NamedTuple):
    """The shapes that are measured unless `--shape` names others."""

    quick: Sequence[str]
    default: Sequence[str]
    sweep: Sequence[str]
    scaling: Sequence[str] = ()
    """These sizes in a row are for plots; the default has them, without compiled providers."""


@dataclass(frozen=True)
class Suite:
    """One op with its shapes, directions and cases."""

    op: str
    shape: Any
    """A named tuple whose fields are letters of LEGEND, with their defaults."""
    directions: Sequence[str]
    providers: Sequence[str]
    """Every name that a provider of a case may have, on any machine."""
    shapes: Callable[[str], Selection]
    """This takes the type of the device."""
    dtypes: Callable[[str], Sequence[torch.dtype]]
    """This takes the type of the device and returns the dtypes that are measured by default."""
    case: Callable[[Any, str, torch.dtype, str], BenchmarkCase]
    """This takes a shape, a direction, a dtype and the type of the device."""
    check: Callable[[Any], None] = lambda shape: None
    """This raises ValueError where a shape's values contradict one another."""

    def parse(self, text: str) -> Any:
        """Return a shape from text as the CSV files have it, as "B=16 N=196".

        Letters that the text leaves out have their defaults.

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


def shape_text(shape: Any) -> str:
    """Return a shape as text, which `Suite.parse` takes; usual values of some kinds are left out.

    So rows that were measured before their letter was there are compared with present ones.
    """
    return " ".join(
        f"{name}={value}"
        for name, value in shape._asdict().items()
        if value != getattr(value, "usual", None)
    )


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
        """The least and the most rows."""
        low, _, high = self.partition("-")
        return int(low), int(high or low)

    def lens(self, batch: int) -> list[int]:
        """Return the lengths of so many examples, evenly spread, in a random order."""
        low, high = self.bounds
        spread = torch.linspace(low, high, batch).round().long()
        return spread[torch.randperm(batch)].tolist()


class Tape(str):
    """Tape lengths, written as the name of a pattern or as a number that every example has."""

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


class Act(str):
    """The activation of the feed-forward for input rows."""

    meaning = f"one of {', '.join(ACTIVATIONS)}"
    usual = "gelu_tanh"

    def __new__(cls, value: object) -> "Act":
        text = super().__new__(cls, value)
        if text not in ACTIVATIONS:
            raise ValueError(value)
        return text


def for_reading(device_type: str) -> Sequence[torch.dtype]:
    """Return the dtypes in which reading is measured: float32, and on a GPU bfloat16 too."""
    return (torch.float32, torch.bfloat16) if device_type == "cuda" else (torch.float32,)


def for_products(device_type: str) -> Sequence[torch.dtype]:
    """Return bfloat16 on a GPU; on a processor float32, and bfloat16 if its products have it."""
    if device_type == "cuda":
        return (torch.bfloat16,)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if native else (torch.float32,)
