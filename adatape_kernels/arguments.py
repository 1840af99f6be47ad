"""Checks of plain arguments: numbers, flags, and that a tensor is one.

Python lets anything stand for anything: True is an int, 2.0 is nearly one, and what is wrong with
None shows far from where it was given. Each check raises one line that names the argument. All of
them can be traced: a number of a traced program passes for the number that it stands for.
"""

import math
import operator
import os
import sys
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_INT = (1 << 63) - 1
"""The largest number that torch takes for a size or an index."""
_MOST_FLOAT = int(sys.float_info.max)
_MOST_CHARACTERS = 80
# Integers of more bits are described; Python refuses to write the longest ones at all.
_MOST_BITS = 256


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {shown(value)}")


def check_int(name: str, value: Any, lowest: int | None = 0, most: int | None = None) -> int:
    """Return a whole number as Python's own; refuse what is none, and one outside the bounds.

    Args:
        name: the argument's name in an error.
        value: anything. Whatever Python takes for an index is a whole number, a bool excepted.
        lowest: the smallest that it may be; None where that depends on another argument.
        most: the largest; None for whatever torch takes, which is 64 bits wide.

    Returns:
        The number as an int, which does not overflow as one of numpy's eight bits would; in a
        traced program that which stands for it.

    Raises:
        TypeError: it is no whole number.
        ValueError: it lies outside the bounds.

    Example:
        >>> from adatape_kernels.arguments import check_int
        >>> check_int("num_heads", 2.0, lowest=1)
        Traceback (most recent call last):
        TypeError: num_heads: expected an int, got 2.0
    """
    if type(value) is not int and not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    number: Any = value if isinstance(value, int | torch.SymInt) else operator.index(value)
    if lowest is None:
        return number
    if value < lowest or (_beyond(number, MOST_INT) if most is None else value > most):
        bounds = f"{lowest} or more" if most is None else f"{lowest} to {most}"
        if most is None and value >= lowest:
            bounds = f"at most {MOST_INT}"
        raise ValueError(f"{name}: expected {bounds}, got {shown(value)}")
    return number


def check_number(
    name: str, value: Any, lowest: float = -math.inf, most: float = math.inf, *, finite: bool = True
) -> None:
    """Refuse what is no real number, NaN, and a number outside the bounds.

    Args:
        name: the argument's name in an error.
        value: anything. Whatever Python turns to a float is a number; a bool and a text are none.
        lowest, most: the smallest and the largest that it may be.
        finite: whether infinity is refused as well.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite, or outside the bounds.

    Example:
        >>> from adatape_kernels.arguments import check_number
        >>> check_number("eps", -5, lowest=0)
        Traceback (most recent call last):
        ValueError: eps: expected a finite number of at least 0, got -5
    """
    if type(value) is not float and type(value) is not int and not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    # NaN compares as False with everything.
    within = -math.inf < value < math.inf if finite else value == value
    within = within and not _beyond(value, _MOST_FLOAT)
    if not (within and lowest <= value <= most):
        kind = "a finite number" if finite else "a number"
        if lowest > -math.inf and most < math.inf:
            kind = f"{lowest} to {most}"
        elif lowest > -math.inf:
            kind += f" of at least {lowest}"
        raise ValueError(f"{name}: expected {kind}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool | torch.SymBool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless an object is of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected an object of {kind.__name__}, got {shown(value)}")


def check_path(name: str, value: object) -> Path:
    """Return a path of the file system; refuse what is none, as bytes and a text with zeros are.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, or holds a zero.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a path, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{name}: expected a path, got {shown(text)}")
    return Path(text)


def _beyond(value: Any, most: int) -> bool:
    """Whether an int, of which Python's have no end, is larger than what torch can hold."""
    # What is traced cannot be, and a comparison would become a guard.
    if type(value) is not int and not isinstance(value, Integral):
        return False
    return not torch.compiler.is_compiling() and abs(int(value)) > most


def _is_int(value: Any) -> bool:
    if isinstance(value, bool | Tensor):
        return False
    if isinstance(value, int | torch.SymInt):
        return True
    try:
        operator.index(value)
    except TypeError:
        return False  # as arrays answer that have an axis
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
        return value.dim() == 0 and real and not value.is_meta
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    if getattr(value, "ndim", 0) or kind not in "iuf":
        return False  # arrays, and what numpy has for a bool, a complex number or a text
    return hasattr(type(value), "__float__") or hasattr(type(value), "__index__")


def shown(value: object) -> str:
    """Return a value as an error shows it: in one line that is not too long.

    A tensor is shown by its dtype and shape.
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
