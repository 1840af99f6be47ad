"""`adatape-kernels export`: a trained model as a file that serves without this package's models."""

import json
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adatape_kernels.cli.exit_codes import EXIT_FAILED
from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import asked_device
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


@dataclass(frozen=True)
class ExportCommand:
    """Write a trained model for serving."""

    source: str = option(metavar="RUN", positional=True)
    """Folder of a run, or a .safetensors file of a model."""
    _: KW_ONLY
    format: str = "torch.export"
    """Torch.export, aoti (compiled, for C++) or onnx."""
    out: str | None = option(
        None, metavar="FILE", unset="model.export.pt2, model.aoti.pt2 or model.onnx in RUN"
    )
    """What to write."""
    batch: int | None = option(None, unset="any number")
    """Most images of a call."""
    capacity: int | None = option(
        None, metavar="ROWS", unset="num_tape_tokens, which always suffice"
    )
    """Tape rows that a read reserves for an image, shared within a batch."""
    threshold: float | None = option(None, unset="the model's own")
    """An image reads on while its halting score is below this."""
    dtype: str | None = option(None, unset="that of the model's file")
    """Float32, float64, bfloat16 or float16."""
    backend: str | None = option(
        None,
        unset="this package's, which choose where they run; cpp for aoti, eager for onnx",
    )
    """Whose ops the file calls: eager (plain torch) or cpp."""
    device: str = "cpu"
    """Cpu, cuda, a GPU by its number as in cuda:1, or auto: cuda where torch finds a GPU of compute
    capability 8.0 or newer, else cpu."""
    json: bool = False
    """Print one JSON object."""


def run(options: ExportCommand) -> int:
    """Write the file and compare it with the model; 1 where they disagree."""
    from adatape_kernels.models import AdaTape
    from adatape_kernels.recipes.exporting import FORMATS, default_target, export_model
    from adatape_kernels.recipes.exporting.agreement import Disagreement
    from adatape_kernels.recipes.model_loading import load

    device = asked_device(options)
    if options.format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}, got {options.format!r}")
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise ValueError(f"dtype: expected {', '.join(_DTYPES)}, got {options.dtype!r}")
    model: Any = load(
        options.source,
        device=device,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        halt_threshold=options.threshold,
    )
    if not isinstance(model, AdaTape):
        raise ValueError(f"source: expected an AdaTape, got a model of {type(model).__name__}")
    out: str | Path | None = options.out
    if out is None:
        out = default_target(options.source, options.format)
    try:
        found = export_model(
            model,
            out,
            format=options.format,
            batch=options.batch,
            capacity=options.capacity,
            backend=options.backend,
        )
    except Disagreement as error:
        say(f"adatape-kernels: {printable(error)}")
        return EXIT_FAILED
    with lenient_output():
        print(json.dumps(asdict(found)) if options.json else _lines(found), flush=True)
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
