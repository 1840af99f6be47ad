"""What the commands share: exit codes, a parser that errs in one line, backend and device."""

import argparse
import contextlib
from typing import NoReturn

import torch

from adatape_kernels.ops.op import BACKENDS, use_backend

EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        self.exit(EXIT_UNREADABLE, f"{self.prog}: {message} (--help lists what there is)\n")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Declare the option that `chosen_backend` reads."""
    parser.add_argument(
        "--backend",
        metavar="NAME[,FALLBACK]",
        help=f"{', '.join(BACKENDS)}, and who takes the calls that it does not serve, as in "
        "cuda,triton; default: the fastest that serves each call",
    )


def chosen_backend(text: str | None) -> contextlib.AbstractContextManager[None]:
    """Return `use_backend` for the names, of which the first is forced and the others fall back."""
    if text is None:
        return use_backend(None)
    name, *fallback = text.split(",")
    return use_backend(name, fallback)


def integers(text: str) -> tuple[int, ...]:
    """Return the integers of a list with commas; raise ValueError, which argparse reports."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Return the words of a list with commas."""
    return tuple(part.strip() for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas; raise ValueError, which argparse reports."""
    return tuple(float(part) for part in text.split(","))


def check_device(name: str) -> None:
    """Raise ValueError unless this is a device that is here."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is here, got cuda, and torch finds no GPU")
