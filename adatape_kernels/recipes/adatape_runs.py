"""Runs whose AdaTape is looked at: their models, their names, and where a report of them may go."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.models.model_file import FILE
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.model_loading import load

REPORT = "report.json"


def adatape_of_run(argument: str, folder: Path, device: torch.device) -> AdaTapeViT:
    """Return the model of a run.

    Args:
        argument: what the folder was given as, for errors.
        folder: the run's folder.
        device: where the model is to be.

    Raises:
        ValueError: there is no model, or it is no AdaTape of images that reads.
    """
    model = load(folder, device=device)
    if not isinstance(model, AdaTapeViT) or not model.config.read_layers:
        raise ValueError(
            f"{argument}: expected that of an AdaTape of images that reads, "
            f"got {printable(folder)}, a {type(model).__name__}"
        )
    return model


def names_of_runs(folders: Sequence[Path], *, again: bool = False) -> list[str]:
    """Return a name for each run: its folder's own, or the path where several are called so.

    Args:
        folders: those of the runs.
        again: whether a folder may be given twice.

    Raises:
        ValueError: it may not, and is.
    """
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if not again and folder in resolved[:number]:
            raise ValueError(f"beside: expected other runs, got {printable(folders[number])} again")
    own = [folder.name for folder in resolved]
    return [
        printable(name if own.count(name) == 1 else folder)
        for name, folder in zip(own, resolved, strict=True)
    ]


def check_report_folder(folder: Path, names: Collection[str]) -> None:
    """Raise ValueError where a report would take the place of another command's.

    A report that is no JSON, which a disk may have made of it, holds nothing that could be lost.

    Args:
        folder: where report.json is to be written; it may be missing.
        names: entries that the command's own report has, and no other command's has all of.
    """
    for file in (FILE, checkpoint.INDEX):
        if (folder / file).exists():
            raise ValueError(
                f"out: expected a folder that is not that of a run, got {printable(folder)}, which "
                f"holds {file}"
            )
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(report, dict) or not report.keys() >= {*names}:
        raise ValueError(
            f"out: expected a folder without another command's report, got {printable(folder)}"
            f"{os.sep}{REPORT}"
        )
