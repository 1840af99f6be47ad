"""What the compiled part was built with, or why there is none."""

import sys
import warnings
from importlib import import_module
from pathlib import Path

VERSION = "0.1.0"
"""Version of the package, that of pyproject.toml."""
ASKED_FOR = "ADATAPE_BUILD=python asked for it"
"""The reason of setup.py for what a user wants."""


def build_facts() -> dict[str, str]:
    """The compiled part's facts, or the reason for its absence; never raises.

    Returns:
        {"compiled": "yes"} and what `_C.build_facts()` reports (csrc/module.cpp), or
        {"compiled": "no", "why": one line}.
    """
    try:
        return {"compiled": "yes", **import_module("adatape_kernels._C").build_facts()}
    except ModuleNotFoundError as error:
        absent = error.name == "adatape_kernels._C"
        return {"compiled": "no", "why": _note() if absent else _first_line(error)}
    except Exception as error:  # e.g. the undefined symbols of a _C that is older than torch
        return {"compiled": "no", "why": _first_line(error)}


def warn_of_plain_python(facts: dict[str, str]) -> None:
    """Tell somebody at a terminal, once, that the compiled kernels are missing, and why.

    pip shows no output of an installation that succeeds, so nobody has heard of it before.
    """
    why = facts.get("why", ASKED_FOR)
    if why != ASKED_FOR and _at_a_terminal():
        warnings.warn(
            f"adatape_kernels runs as plain Python, without its compiled kernels: {why}",
            stacklevel=3,
        )


def _at_a_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it was closed
        return False


def _note() -> str:
    """The reason that setup.py wrote down."""
    try:
        note = Path(__file__).with_name("_build_note.txt").read_text("utf-8", "replace")
        return note.strip()
    except OSError:
        return "not built: run `pip install --no-build-isolation -e .` in the repository"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
