"""A trained model as a file that serves without this package's models, or without Python.

`export_model` traces a model with any number of inputs a batch, writes it in one of three formats,
loads what it wrote, and compares it with the model before the file gets its name.
"""

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from adatape_kernels.arguments import check_int, check_kind, check_path, shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTape
from adatape_kernels.recipes.exporting.agreement import compare
from adatape_kernels.recipes.exporting.artefacts import (
    FORMATS,
    check_installed,
    load_artefact,
    quiet,
    suffix_of,
    write_artefact,
)
from adatape_kernels.recipes.exporting.traced_program import (
    Options,
    check_options,
    description,
    trace,
)
from adatape_kernels.recipes.output_folder import check_output_folder


@dataclass(frozen=True)
class Export:
    """What was exported, and how near it is to the model.

    Example:
        >>> from adatape_kernels.recipes.exporting import Export
        >>> Export("m.onnx", "onnx", "eager", None, None, (1, 2), 1e-6, 4096).backend
        'eager'
    """

    file: str
    """The file that was written."""
    format: str
    """"torch.export", "aoti" or "onnx"."""
    backend: str
    """"adatape", "cpp" or "eager": whose ops the file calls; see `export_model`."""
    batch: int | None
    """Most inputs of a call; None where any number will do."""
    capacity: int | None
    """Tape rows that are reserved for an input and a read; None for plain torch."""
    batch_sizes: tuple[int, ...]
    """Sizes of the batches on which the file was compared with the model."""
    largest_difference: float
    """The largest difference between a logit of the file and one of the model."""
    size: int
    """Bytes of the file."""


def export_model(
    model: AdaTape,
    file: str | os.PathLike[str],
    *,
    format: str = "torch.export",
    batch: int | None = None,
    capacity: int | None = None,
    backend: str | None = None,
) -> Export:
    """Write a model for serving, and compare what was written with it.

    What is written takes a batch of inputs as the model does, images that its preprocessing made
    for instance, and returns the logits (batch, num_classes) and the number of tape tokens of each
    input (batch,). A JSON text `adatape_kernels` goes along with it, which holds the configuration,
    the class names, the preprocessing, and the shapes and names of input and outputs.

    Args:
        model: an AdaTapeViT or an AdaTapeParity, on any device and in any dtype that the format
            takes; it is not changed, and exported in the mode for evaluation.
        file: what to write, with a name that ends in .pt2, or in .onnx for onnx; a file of this
            name is replaced.
        format: "torch.export", a program for `torch.export.load`; "aoti", compiled by AOTInductor
            for this kind of processor; or "onnx".
        batch: most inputs of a call; None for any number.
        capacity: tape rows that each read reserves for an input, all of which a batch may share;
            None for num_tape_tokens, which always suffice. A batch that reads more fails.
        backend: whose ops the file calls. "eager" is plain torch, which needs nothing of this
            package and pads the tape of every input to num_tape_tokens; "cpp" is our C++ for CPUs,
            which runs without Python; None is, for torch.export, the ops of this package, which
            choose a backend where they run, for aoti "cpp" where it can serve and "eager" where
            not, and for onnx "eager".

    Returns:
        What was written, and the largest difference.

    Raises:
        ValueError: an argument is out of range, or does not go with the format or the model.
        TypeError: an argument is of another type altogether.
        RuntimeError: a package that the format needs is not installed, or torch cannot compile.
        Disagreement: the file computes something else than the model; it is not kept.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, adatape_kernels as ak
        >>> from adatape_kernels.recipes.exporting import export_model
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(model, f"{folder}/model.pt2", batch=8).largest_difference
        0.0
    """
    check_kind("model", model, AdaTape)
    if format not in FORMATS:
        raise ValueError(f"format: expected {', '.join(FORMATS)}, got {shown(format)}")
    batch = None if batch is None else check_int("batch", batch, 1)
    options = check_options(model, Options(format, batch, capacity, backend))
    target = _checked_target(check_path("file", file), format)
    check_installed(format)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    # The file appears when it is whole and right. Its name stands in what torch writes, so that it
    # is made under the same one.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        made = Path(folder, target.name)
        with quiet():
            write_artefact(trace(frozen, options), made, options, description(frozen, options))
            served = load_artefact(made, format)
        sizes, difference = compare(served, frozen, options)
        size = made.stat().st_size
        for part in Path(folder).iterdir():
            shutil.move(part, target.with_name(part.name))
    return Export(
        os.fspath(target),
        format,
        options.backend or "adatape",
        batch,
        options.capacity,
        sizes,
        difference,
        size,
    )


def default_target(source: str | os.PathLike[str], format: str) -> Path:
    """Return where an export of a run or of a model's file goes: into its folder.

    Example:
        >>> from adatape_kernels.recipes.exporting import default_target
        >>> default_target("runs/model.safetensors", "aoti").as_posix()
        'runs/model.aoti.pt2'
    """
    place = check_path("source", source)
    folder = place if place.is_dir() else place.parent
    stem = "model" if format == "onnx" else f"model.{'aoti' if format == 'aoti' else 'export'}"
    return folder / f"{stem}{suffix_of(format)}"


def _checked_target(file: Path, format: str) -> Path:
    """Return the file to write. Raises ValueError where it cannot be."""
    suffix = suffix_of(format)
    if file.suffix != suffix:
        raise ValueError(f"out: expected a file *{suffix} for {format}, got {printable(file)}")
    if file.is_dir():
        raise ValueError(f"out: expected a file, got the folder {printable(file)}")
    check_output_folder(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


__all__ = ["FORMATS", "Export", "default_target", "export_model"]
