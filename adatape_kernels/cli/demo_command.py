"""`adatape-kernels demo`: training on real digits, and what elasticity saves there."""

import argparse
from typing import Any

from adatape_kernels.cli.options import add_device, add_dtype, asked_device


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("demo", help="train on real digits, compare elastic with padded")
    parser.add_argument(
        "--out", default="adatape-demo", metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, help="default: about a minute on two cores")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_device(parser)
    add_dtype(parser, "float32")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from adatape_kernels.recipes import demo

    epochs = demo.EPOCHS if arguments.epochs is None else arguments.epochs
    demo.run(
        arguments.out,
        epochs=epochs,
        seed=arguments.seed,
        device=asked_device(arguments),
        dtype=arguments.dtype,
    )
    return 0
