"""How lines of several models are told apart, in colour, by the colour-blind, and in grey."""

from typing import Any

STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
    ("#56b4e9", "v", (0, (9, 3))),
    ("#5d3a00", "P", (0, (1, 1))),
)
"""Colour, mark and dashes of a line; the colours keep apart for the colour-blind."""


def style_of(number: int) -> dict[str, Any]:
    """Return matplotlib's names and values for line `number`, whose mark is hollow."""
    color, marker, dashes = STYLES[number % len(STYLES)]
    return dict(color=color, marker=marker, linestyle=dashes, markerfacecolor="none")
