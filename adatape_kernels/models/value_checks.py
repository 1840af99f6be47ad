"""Checks of single values; each ends in one line that names the argument."""

import math
from collections.abc import Collection
from numbers import Integral, Real

_MOST_CHARACTERS = 80
# Integers of more bits are described; Python refuses to write the longest ones at all.
_MOST_BITS = 256


def shown(value: object) -> str:
    """Return a value as an error shows it: in one line that is not too long."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return a value as an int; raise ValueError unless it is an integer from `least` to `most`.

    A bool is none, and neither is a float without a fraction.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected an integer, got {shown(value)}")
    number = int(value)
    if number < least or (most is not None and number > most):
        range_ = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {range_}, got {shown(number)}")
    return number


def check_number(name: str, value: object, expected: str = "a number") -> float:
    """Return a value as a float; raise ValueError where it is none, as a bool and NaN are."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number below 1e308, got {shown(value)}") from None
    if math.isnan(number):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless a value is one of several words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless a value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless an object is of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected an object of {kind.__name__}, got {shown(value)}")
