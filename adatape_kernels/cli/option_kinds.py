"""What an option may hold, by its annotation: on the command line, in a file and in `--help`."""

import argparse
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.models.value_checks import as_choice

# By the type of one value: what it is called, several of them, and how `--help` abbreviates it.
_WORDS: dict[type, tuple[str, str, str]] = {
    int: ("an integer", "integers", "N"),
    float: ("a number", "numbers", "X"),
    str: ("a text", "names", "NAME"),
    bool: ("true or false", "", ""),
}


@dataclass(frozen=True)
class OptionKind:
    """What one option may hold."""

    item: type
    """Type of a value, or of each of several: int, float, str or bool."""
    many: bool = False
    """Whether it is a tuple, written with commas between."""
    by_word: bool = False
    """Whether each value of a tuple is a word of its own, which may hold commas."""
    optional: bool = False
    """Whether None stands for a default that is decided later."""
    choices: tuple[str, ...] = ()
    """The only texts that it may be; empty for any."""

    @classmethod
    def of(cls, annotation: Any, *, by_word: bool = False) -> "OptionKind":
        """Return the kind that an annotation such as `tuple[int, ...] | None` stands for."""
        parts = [annotation]
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            parts = list(typing.get_args(annotation))
        (inner,) = (part for part in parts if part is not type(None))
        optional = len(parts) > 1
        if typing.get_origin(inner) is typing.Literal:
            return cls(str, optional=optional, choices=typing.get_args(inner))
        if typing.get_origin(inner) is tuple:
            return cls(typing.get_args(inner)[0], True, by_word, optional)
        return cls(inner, optional=optional)

    @property
    def expected(self) -> str:
        """What is asked for, as an error says it."""
        one, several, _ = _WORDS[self.item]
        if self.choices:
            return " or ".join(map(repr, self.choices))
        return f"{several} with commas between" if self.many and not self.by_word else one

    @property
    def metavar(self) -> str:
        """What stands for a value in `--help`."""
        word = _WORDS[self.item][2]
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return f"{word},{word}" if self.many and not self.by_word else word

    def of_word(self, value: Any) -> Any:
        """Return the value of a word of the command line; what is no text has been read already.

        Raises:
            argparse.ArgumentTypeError: it is none of this kind.
        """
        if not isinstance(value, str):
            return value
        try:
            return self._of_text(value)
        except ValueError:
            raise argparse.ArgumentTypeError(self._refusal(value)) from None

    def of_entry(self, name: str, value: object) -> Any:
        """Return the value of an entry of a file, whose numbers are numbers and not texts of them.

        Args:
            name: the option.
            value: None, a bool, an int, a float, a str, or a list of such.

        Raises:
            ValueError: it is none of this kind.
        """
        if value is None and self.optional:
            return None
        if self.choices and isinstance(value, str):
            return as_choice(name, value, self.choices)
        if self.many:
            return self._several(name, value)
        if not self._is_item(value):
            hint = ""
            if self.item is str and value is not None and not isinstance(value, list):
                hint = ", which quotes would make a text"
            raise ValueError(f"{name}: {self._refusal(value)}{hint}")
        return self._own(value)

    def _several(self, name: str, value: object) -> tuple[Any, ...]:
        if isinstance(value, str) and not self.by_word:
            try:
                return self._of_text(value)
            except ValueError:
                raise ValueError(f"{name}: {self._refusal(value)}") from None
        values = value if isinstance(value, list) else [value]
        if not all(map(self._is_item, values)):
            raise ValueError(
                f"{name}: expected a list of {_WORDS[self.item][1]}, got {shown(value)}"
            )
        return tuple(map(self._own, values))

    def _of_text(self, text: str) -> Any:
        if self.choices:
            return as_choice("", text, self.choices)
        if self.many and not self.by_word:
            parts = (part.strip() for part in text.split(","))
            return tuple(self.item(part) for part in parts)
        return self.item(text)

    def _is_item(self, value: object) -> bool:
        # A bool is an int to Python, and a whole number is a number to people.
        kinds: Callable[[object], bool] = {
            int: lambda each: type(each) is int,
            float: lambda each: type(each) in (int, float),
        }.get(self.item, lambda each: isinstance(each, self.item))
        return kinds(value)

    def _own(self, value: Any) -> Any:
        return float(value) if self.item is float else value

    def _refusal(self, value: object) -> str:
        return f"expected {self.expected}, got {shown(value)}"
