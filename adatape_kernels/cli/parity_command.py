"""`adatape-kernels parity`: AdaTape and its baselines on the parity task."""

import argparse
import dataclasses
from typing import Any

from adatape_kernels.cli.options import (
    add_backend,
    add_device,
    add_dtype,
    asked_device,
    chosen_backend,
    integers,
    names,
)


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "parity", help="train AdaTape and its baselines on the parity task, into one table"
    )
    add = parser.add_argument
    add(
        "--lengths",
        type=integers,
        default=(16, 32, 64),
        metavar="N,N",
        help="numbers of symbols of a sequence; default: 16,32,64",
    )
    add(
        "--models",
        type=names,
        default=("adatape", "transformer", "universal"),
        metavar="NAME,NAME",
        help="adatape, transformer, universal, and the ablations adatape-last-read, "
        "adatape-fixed-query, adatape-one-by-one and adatape-wide-keys; "
        "default: adatape,transformer,universal",
    )
    add(
        "--seeds",
        type=integers,
        default=(0, 1, 2),
        metavar="N,N",
        help="each is a run of each model at each length; default: 0,1,2",
    )
    add("--out", default="adatape-parity", metavar="FOLDER", help="default: %(default)s")
    for name, kind, default, text in (
        ("steps", int, 2500, "number of steps of a run"),
        ("batch", int, 64, "number of new sequences in a step"),
        ("lr", float, 1e-3, "the highest learning rate"),
        ("eval-examples", int, 6400, "number of fixed sequences that a run is measured on"),
    ):
        help_text = f"{text}; default: %(default)s"
        add(f"--{name}", type=kind, default=default, metavar="N", help=help_text)
    add(
        "--protocol",
        default="uniform",
        metavar="NAME",
        help="uniform symbols, or extrapolate: train where at most half as many symbols as the "
        "length are not 0, measure where more are; default: %(default)s",
    )
    add(
        "--curriculum",
        type=float,
        metavar="N",
        help="share of the steps behind which sequences, which grow from 8 symbols as a model "
        "learns them, have their length; default: 0 for uniform symbols up to length 32, else 0.5",
    )
    add(
        "--sequence-token",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let AdaTape see the sequence as one token beside its tape; default: where all "
        "sequences of a run have one length",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time, a thread each; default: one a core, and 1 on a GPU",
    )
    add_backend(parser)
    add_device(parser)
    add_dtype(parser, "float32")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train the table, or what is missing of it."""
    from adatape_kernels.recipes.parity import parity_table
    from adatape_kernels.recipes.parity.parity_config import ParityConfig

    fields = [field.name for field in dataclasses.fields(ParityConfig)]
    config = ParityConfig(**{name: getattr(arguments, name) for name in fields})
    backends = arguments.backend.split(",") if arguments.backend else ()
    with chosen_backend(arguments.backend):  # which says what is wrong with the names
        parity_table.run(
            arguments.out,
            config,
            jobs=arguments.jobs,
            backends=backends,
            device=asked_device(arguments),
        )
    return 0
