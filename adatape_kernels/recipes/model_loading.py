"""Models from files and from the folders of runs, those of version 0.1 too."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_kind, check_path, shown
from adatape_kernels.data import Normaliser, Preprocessing, digits
from adatape_kernels.data.printable import printable
from adatape_kernels.layers.reader import given_limits
from adatape_kernels.models import AdaTapeConfig, EncoderConfig
from adatape_kernels.models.model_file import FILE, Description, SavedModel, read
from adatape_kernels.recipes import checkpoint, demo
from adatape_kernels.recipes.model_tensors import evaluated_weights
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.training.saved_options import with_present_names
from adatape_kernels.recipes.training.train_config import TrainConfig


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    halt_threshold: float | None = None,
    num_tape_tokens: int | None = None,
    config: EncoderConfig | None = None,
) -> SavedModel:
    """Build a trained model from a file that `save` wrote, or from the folder of a run.

    Args:
        source: a safetensors file; or a folder with a model.safetensors, as `save`, the demo and a
            finished run of `train` leave it; or the folder of a run that has not finished, whose
            last checkpoint counts.
        device: where the model is to be.
        dtype: the floating dtype of its parameters; None for that of the file.
        halt_threshold, num_tape_tokens: the cost knobs of an AdaTape, in place of the model's own;
            None leaves them.
        config: of a file that holds tensors alone, as version 0.1 wrote them; any other file and
            any folder know their own.

    Returns:
        The model, in the mode for evaluation. Its `class_names` and `preprocessing` are those that
        it was saved or trained with, None where they are not known.

    Raises:
        ValueError: there is no model, a file is cut, altered, of a newer format or of another
            configuration, or an argument is out of range; the error names the file or argument.
        TypeError: an argument is of another type altogether.
        OSError: a file cannot be read.

    Example:
        >>> import tempfile, adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = ak.save(model, folder)
        ...     ak.load(file, halt_threshold=0.5).config.halt_threshold
        0.5
    """
    file = check_path("source", source)
    if dtype is not None:
        check_kind("dtype", dtype, torch.dtype)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    if config is not None:
        check_kind("config", config, EncoderConfig)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = printable((str(error).splitlines() or ["none"])[0], 200)
        raise ValueError(
            f"device: expected one that is here, got {shown(device)} ({reason})"
        ) from None
    file, description, tensors = _found(file, config)
    limits = given_limits(halt_threshold, num_tape_tokens)
    if limits:
        if not isinstance(description.config, AdaTapeConfig):
            name, value = next(iter(limits.items()))
            raise ValueError(
                f"{name}: expected None for a model that reads no tape, got {shown(value)}"
            )
        description = replace(description, config=replace(description.config, **limits))
    return description.build(tensors, file).to(device=where, dtype=dtype)


def _found(
    source: Path, config: EncoderConfig | None
) -> tuple[Path, Description, Mapping[str, Tensor]]:
    """Return the file that holds a source's tensors, what describes them, and the tensors."""
    name = printable(source)
    if not source.exists():
        raise ValueError(f"source: expected a file or a folder, got {name}, which is not there")
    file = source / FILE if source.is_dir() else source
    if source.is_dir() and not file.exists():
        if (source / checkpoint.INDEX).exists():
            return _from_checkpoint(source)
        raise ValueError(
            f"source: expected a folder with {FILE} or {checkpoint.INDEX}, got {name}, "
            "which has neither"
        )
    if not file.is_file():
        raise ValueError(f"source: expected a regular file, got {printable(file)}")
    description, tensors = read(file)
    if description is None and config is not None:
        description = Description(config)
    elif description is not None and config is not None and description.config != config:
        raise ValueError(f"config: expected none, or that of {printable(file)}, got another")
    if description is None and (file.parent / REPORT).is_file():
        description = _of_report(file.parent / REPORT)
    if description is None:
        raise ValueError(
            f"{printable(file)}: expected a model's configuration in the file's metadata, as "
            "adatape_kernels.save writes it, or the argument config, got neither"
        )
    return file, description, tensors


def _from_checkpoint(folder: Path) -> tuple[Path, Description, Mapping[str, Tensor]]:
    """Return the same of a run that has not finished."""
    saved, file = checkpoint.load(folder), folder / checkpoint.INDEX
    weights = evaluated_weights(saved.tensors)
    return file, _of_run(file, saved.config, saved.data), weights


def _of_report(file: Path) -> Description:
    """Describe the model of a finished run of version 0.1 by its report.json. Raises ValueError."""
    try:
        report = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise ValueError(f"{printable(file)}: expected the report of a run, got something else")
    if "config" in report:
        return _of_run(file, report["config"], report.get("data"))
    if type(report.get("seed")) is not int:
        raise ValueError(f"{printable(file)}: expected the report of a run, got another")
    # The demo has one configuration, and its images come with scikit-learn.
    images = digits(report["seed"])
    normalise = Normaliser.of(images.train_images)
    preprocessing = Preprocessing.of(demo.CONFIG.image_size, normalise)
    return Description(demo.CONFIG, images.class_names, preprocessing)


def _of_run(file: Path, config: Any, data: Any) -> Description:
    """Describe a run's model by the options and the facts that were written. Raises ValueError."""
    try:
        names = tuple(map(str, data["class_names"]))
        normalise = Normaliser(tuple(data["mean"]), tuple(data["std"]))
        options = TrainConfig.of_saved(with_present_names(config))
        return Description(
            options.vit_config(len(names), len(normalise.mean)),
            names,
            Preprocessing.of(options.image_size, normalise),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{printable(file)}: expected the options and images of a run, got "
            f"{printable(error, 200)}"
        ) from None
