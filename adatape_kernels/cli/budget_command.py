"""`adatape-kernels budget`: trained models at many halting thresholds and longest tapes."""

import argparse
from typing import Any

from adatape_kernels.cli.options import add_backend, chosen_backend, integers, numbers


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "budget", help="measure one trained model at many thresholds and longest tapes"
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="folder of a run of train, or of the demo")
    add(
        "--beside",
        nargs="+",
        default=[],
        metavar="RUN",
        help="further runs on the same images, measured at the same limits",
    )
    add(
        "--thresholds",
        type=numbers,
        metavar="X,X",
        help="halting thresholds; default: seven from 0 to twice the model's own",
    )
    add(
        "--max-tape",
        type=integers,
        metavar="N,N",
        help="most tape tokens of a read; default: the model's own",
    )
    add("--rounds", type=int, default=5, metavar="N", help="timings of each; default: %(default)s")
    add("--data-dir", metavar="FOLDER", help="the set's files; default: where they were")
    add("--out", default="adatape-budget", metavar="FOLDER", help="default: %(default)s")
    add_backend(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print the table."""
    from adatape_kernels.recipes.budget import budget

    with chosen_backend(arguments.backend):
        budget.run(
            arguments.source,
            arguments.out,
            beside=arguments.beside,
            thresholds=arguments.thresholds,
            max_tape=arguments.max_tape,
            data_dir=arguments.data_dir,
            rounds=arguments.rounds,
        )
    return 0
