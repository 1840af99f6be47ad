"""What the commands share: exit codes, a parser that errs in one line, and common options."""

import argparse
import contextlib
from typing import Any, NoReturn

import torch

from adatape_kernels.ops.op import BACKENDS, use_backend
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.training.execution import DTYPES

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


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Declare the option that `asked_device` reads."""
    parser.add_argument(
        "--device",
        default=default,
        metavar="NAME",
        help="cpu, cuda, a GPU by its number as in cuda:1, or auto: cuda where torch finds a GPU "
        "of compute capability 8.0 or newer, else cpu; default: %(default)s",
    )


def asked_device(arguments: argparse.Namespace) -> torch.device:
    """Return the device that is asked for. Raises ValueError where it is none, or is not here."""
    return chosen_device(arguments.device, getattr(arguments, "backend", None))


def add_dtype(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Declare the option of the dtype, which the recipes check."""
    parser.add_argument(
        "--dtype",
        default=default,
        metavar="NAME",
        help=f"what products are computed in: {' or '.join(DTYPES)}, by autocast; the parameters "
        "are float32; default: float32",
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `asked_execution` takes out."""
    group = parser.add_argument_group("execution", "changes a curve by rounding alone")
    group.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="compute a step's batch in N parts, one after another, for less memory; default: 1",
    )
    group.add_argument(
        "--checkpoint-layers",
        action=argparse.BooleanOptionalAction,
        help="compute each layer once more in the backward pass, for less memory",
    )
    group.add_argument(
        "--compile",
        dest="compiled",
        action=argparse.BooleanOptionalAction,
        help="make the training steps by torch.compile",
    )
    group.add_argument(
        "--parallel",
        metavar="KIND",
        help="under torchrun: ddp, every process holds all parameters, or fsdp, each a part of "
        "every one; default: ddp",
    )
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, capture a whole training step as a CUDA graph and replay it",
    )


def asked_execution(options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `add_execution` out of a command's options, and return them."""
    names = ("accumulate", "checkpoint_layers", "compiled", "graph", "parallel")
    return {name: options.pop(name) for name in names}


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare the options of how images are read, of which `asked_loading` takes some out."""
    group = parser.add_argument_group("reading images")
    for name, kind, text in (
        ("workers", int, "number of processes that prepare batches ahead; any gives one curve"),
        ("unreadable-limit", int, "the most images of a half that are skipped; default: 100"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    group.add_argument(
        "--look",
        metavar="WHICH",
        help="images that are decoded once before training: all, test or none; default: all",
    )
    group.add_argument(
        "--unreadable",
        metavar="KIND",
        help="what an image file that cannot be read does: stop, or skip it; default: stop",
    )


def asked_loading(options: dict[str, Any]) -> dict[str, Any]:
    """Take what no curve depends on out of a command's options, and return it."""
    return {name: options.pop(name) for name in ("workers", "look")}
