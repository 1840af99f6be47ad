"""Options that are lists: of distinct integers, and of distinct names."""

from collections.abc import Collection, Iterable

from adatape_kernels.arguments import shown
from adatape_kernels.models.value_checks import as_integer


def distinct_integers(name: str, values: object, least: int, most: int) -> tuple[int, ...]:
    """Return distinct integers; raise ValueError where they are none, or out of range."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}: expected integers, got {shown(values)}")
    numbers = tuple(as_integer(name, value, least, most) for value in values)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"{name}: expected one or more distinct integers, got {shown(values)}")
    return numbers


def distinct_names(name: str, values: object, known: Collection[str]) -> tuple[str, ...]:
    """Return distinct names of known ones; raise ValueError where one is unknown."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}: expected names, got {shown(values)}")
    names = tuple(values)
    for each in names:
        if not isinstance(each, str) or each not in known:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {shown(each)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{name}: expected one or more distinct names, got {shown(values)}")
    return names
