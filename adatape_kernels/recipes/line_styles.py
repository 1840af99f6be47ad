"""How the lines of a picture are told apart: in colour, by the colour-blind, and in grey."""

from typing import Any

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a0527f", "black", "#56b4e9")
# One more than there are colours and dashes, so that a seventh line does not look like the first.
_MARKS = ("o", "s", "^", "D", "v", "X", "P")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (9, 3)))


def style_of(number: int) -> dict[str, Any]:
    """Return colour, mark and dashes of line `number`, by the names that matplotlib has."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markerfacecolor": "none",
    }
