"""`adatape-kernels predict`: what a trained model says of image files."""

import json
from dataclasses import KW_ONLY, asdict, dataclass
from typing import TYPE_CHECKING

from adatape_kernels.cli.exit_codes import EXIT_UNREADABLE
from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    asked_device,
    chosen_backend,
)
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.terminal import lenient_output, say

if TYPE_CHECKING:
    from adatape_kernels.recipes.predict import Prediction


@dataclass(frozen=True)
class PredictCommand(BackendOption, DeviceOption):
    """Classify image files by a trained model."""

    source: str = option(metavar="RUN", positional=True)
    """Folder of a run, or a .safetensors file of a model."""
    images: tuple[str, ...] = option(metavar="IMAGE", positional=True, by_word=True)
    """A JPEG, PNG, WebP or BMP."""
    _: KW_ONLY
    top: int = 3
    """Classes to name."""
    threshold: float | None = option(None, unset="the model's own")
    """An image reads on while its halting score is below this."""
    json: bool = False
    """Print one JSON object a line."""


def run(options: PredictCommand) -> int:
    """Print a line for each image; 2 where a file is no image, which the others do not mind."""
    from adatape_kernels.recipes.model_loading import load
    from adatape_kernels.recipes.predict import Predictor

    device = asked_device(options)
    code = 0
    with chosen_backend(options.backend), lenient_output():
        model = load(options.source, device=device, halt_threshold=options.threshold)
        predictor = Predictor(model, top=options.top)
        for file in options.images:
            try:
                found = predictor(file)
            except ValueError as error:
                say(f"adatape-kernels: {printable(error)}")
                code = EXIT_UNREADABLE
                continue
            print(_json_line(found) if options.json else _line(found), flush=True)
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
