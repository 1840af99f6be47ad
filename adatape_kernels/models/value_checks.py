"""Values as a configuration holds them and a file keeps them: checked, in Python's own types.

All that is wrong with one is a ValueError in one line that names the argument, its type too, since
values come from command lines and files. What kernels and layers are called with is checked by
`adatape_kernels.arguments`, which converts nothing and can be traced.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real

from adatape_kernels.arguments import shown


def as_integer(name: str, value: object, least: int, most: int | None = None) -> int:
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


def as_number(name: str, value: object, expected: str = "a number") -> float:
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


def as_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return a value; raise ValueError unless it is one of several words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {shown(value)}")
    return value


def as_flag(name: str, value: object) -> bool:
    """Return a value; raise ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return value
