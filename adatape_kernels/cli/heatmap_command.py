"""`adatape-kernels heatmap`: what a trained model reads, in pictures and numbers."""

import argparse
from typing import Any

from adatape_kernels.cli.options import add_backend, chosen_backend


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("heatmap", help="draw what a trained model reads")
    add = parser.add_argument
    add("source", metavar="RUN", help="folder of a run of train, or of the demo")
    add("images", nargs="*", metavar="IMAGE", help="image files to draw in place of test images")
    add(
        "--beside",
        nargs="+",
        default=[],
        metavar="RUN",
        help="further runs, with patches of another size perhaps, drawn side by side with RUN",
    )
    add("--no-images", action="store_true", help="show no image of the set, only what is read")
    add("--data-dir", metavar="FOLDER", help="the set's files; default: where they were")
    add("--out", default="adatape-heatmap", metavar="FOLDER", help="default: %(default)s")
    add_backend(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the pictures."""
    from adatape_kernels.recipes.heatmap import heatmap

    with chosen_backend(arguments.backend):
        heatmap.run(
            arguments.source,
            arguments.out,
            images=arguments.images,
            beside=arguments.beside,
            data_dir=arguments.data_dir,
            show_images=not arguments.no_images,
        )
    return 0
