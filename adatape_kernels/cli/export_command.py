"""`adatape-kernels export`: a trained model as a file that serves without this package's models."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from adatape_kernels.cli.options import EXIT_FAILED, add_device, asked_device
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.terminal import lenient_output, say

if TYPE_CHECKING:
    from adatape_kernels.recipes.exporting import Export

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_OPS = {
    "adatape": "the ops of this package",
    "cpp": "its C++ ops for CPUs",
    "eager": "plain torch ops",
}


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("export", help="write a trained model for serving")
    option = parser.add_argument
    option("source", metavar="RUN", help="folder of a run, or a .safetensors file of a model")
    option(
        "--format",
        default="torch.export",
        help="torch.export, aoti (compiled, for C++) or onnx; default: %(default)s",
    )
    option(
        "--out",
        metavar="FILE",
        help="what to write; default: model.export.pt2, model.aoti.pt2 or model.onnx in RUN",
    )
    option("--batch", type=int, metavar="N", help="most images of a call; default: any number")
    option(
        "--capacity",
        type=int,
        metavar="ROWS",
        help="tape rows that a read reserves for an image, shared within a batch; "
        "default: num_tape_tokens, which always suffice",
    )
    option(
        "--threshold",
        type=float,
        metavar="X",
        help="an image reads on while its halting score is below this; default: the model's own",
    )
    option("--dtype", metavar="D", help=f"{', '.join(_DTYPES)}; default: that of the model's file")
    option(
        "--backend",
        metavar="NAME",
        help="whose ops the file calls: eager (plain torch) or cpp; default: this package's, which "
        "choose where they run; cpp for aoti, eager for onnx",
    )
    add_device(parser, "cpu")
    option("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and compare it with the model; 1 where they disagree."""
    from adatape_kernels.models import AdaTape
    from adatape_kernels.recipes.exporting import FORMATS, default_target, export_model
    from adatape_kernels.recipes.exporting.agreement import Disagreement
    from adatape_kernels.recipes.model_loading import load

    device = asked_device(arguments)
    if arguments.format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}, got {arguments.format!r}")
    if arguments.dtype is not None and arguments.dtype not in _DTYPES:
        raise ValueError(f"dtype: expected {', '.join(_DTYPES)}, got {arguments.dtype!r}")
    model: Any = load(
        arguments.source,
        device=device,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        halt_threshold=arguments.threshold,
    )
    if not isinstance(model, AdaTape):
        raise ValueError(f"source: expected an AdaTape, got a model of {type(model).__name__}")
    out = arguments.out
    if out is None:
        out = default_target(arguments.source, arguments.format)
    try:
        found = export_model(
            model,
            out,
            format=arguments.format,
            batch=arguments.batch,
            capacity=arguments.capacity,
            backend=arguments.backend,
        )
    except Disagreement as error:
        say(f"adatape-kernels: {printable(error)}")
        return EXIT_FAILED
    with lenient_output():
        print(json.dumps(asdict(found)) if arguments.json else _lines(found), flush=True)
    return 0


def _lines(found: "Export") -> str:
    batch = "batches of any size" if found.batch is None else f"batches of up to {found.batch}"
    sizes = ", ".join(map(str, found.batch_sizes))
    return (
        f"{printable(found.file)}: {found.format}, {_OPS[found.backend]}, {batch}, "
        f"{found.size / 2**20:.1f} MiB\n"
        f"compared with the model on random inputs in batches of {sizes}: largest difference of a "
        f"logit {found.largest_difference:.1e}"
    )
