"""`adatape-kernels predict`: what a trained model says of image files."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adatape_kernels.cli.options import (
    EXIT_UNREADABLE,
    add_backend,
    add_device,
    asked_device,
    chosen_backend,
)
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.terminal import lenient_output, say

if TYPE_CHECKING:
    from adatape_kernels.recipes.predict import Prediction


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("predict", help="classify image files by a trained model")
    option = parser.add_argument
    option("source", metavar="RUN", help="folder of a run, or a .safetensors file of a model")
    option("images", nargs="+", metavar="IMAGE", help="a JPEG, PNG, WebP or BMP")
    option("--top", type=int, default=3, metavar="N", help="classes to name; default: %(default)s")
    option(
        "--threshold",
        type=float,
        metavar="X",
        help="an image reads on while its halting score is below this; default: the model's own",
    )
    option("--json", action="store_true", help="print one JSON object a line")
    add_device(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each image; 2 where a file is no image, which the others do not mind."""
    from adatape_kernels.recipes.model_loading import load
    from adatape_kernels.recipes.predict import Predictor

    device = asked_device(arguments)
    code = 0
    with chosen_backend(arguments.backend), lenient_output():
        model = load(arguments.source, device=device, halt_threshold=arguments.threshold)
        predictor = Predictor(model, top=arguments.top)
        for file in arguments.images:
            try:
                found = predictor(file)
            except ValueError as error:
                say(f"adatape-kernels: {printable(error)}")
                code = EXIT_UNREADABLE
                continue
            print(_json_line(found) if arguments.json else _line(found), flush=True)
    return code


def _line(found: "Prediction") -> str:
    classes = ", ".join(f"{printable(name)} {share:.1%}" for name, share in found.top)
    work = f"{found.tape_tokens} tape {'token' if found.tape_tokens == 1 else 'tokens'}"
    if found.rows is not None:
        work = f"{found.rows} rows"
    return f"{printable(found.file)}: {classes} ({work}, {found.milliseconds:.1f} ms)"


def _json_line(found: "Prediction") -> str:
    top = [{"class": name, "probability": share} for name, share in found.top]
    entries = {**asdict(found), "top": top}
    if found.rows is None:
        del entries["rows"]
    return json.dumps(entries)
