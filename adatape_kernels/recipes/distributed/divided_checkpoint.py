"""A checkpoint of which each rank writes what it holds.

The files of the ranks come first, each under a name of its own, and then the index, which names
all of them. A rank that is killed before leaves the checkpoint before this one, and what is left
over is known by name.
"""

import hashlib
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adatape_kernels.data.printable import printable
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.distributed.divided_parameters import is_part, part_of
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.run_folder import RunFolder, write_file


def save_together(folder: Path, run: RunFolder | None, saved: Checkpoint, ranks: Ranks) -> None:
    """Write a checkpoint; all ranks call this together, with what each holds of the tensors.

    Args:
        folder: the run's folder, which all ranks see.
        run: what writes into it, on rank 0; None on the others.
        saved: what is written; what is no tensor counts on rank 0 alone.
        ranks: the processes.

    Raises:
        OSError: a file cannot be written; the error names it.
    """
    divided = {name: tensor for name, tensor in saved.tensors.items() if is_part(tensor)}
    if not divided:
        if run is not None:
            checkpoint.save(run, saved)
        return
    names: list[tuple[str, str]] = []
    if run is not None:
        checkpoint.remove_leftovers(run)
        names = _names(folder, saved.epoch, ranks.count)
        run.note(*(name for both in names for name in both))
    name, unfinished = ranks.gathered(names)[ranks.number]
    parts = ranks.gathered([_written(folder, name, unfinished, divided)])
    if run is not None:
        whole = {name: tensor for name, tensor in saved.tensors.items() if name not in divided}
        checkpoint.save(run, replace(saved, tensors=whole), parts)


def check_folder_of_all(folder: Path, run: RunFolder | None, ranks: Ranks) -> None:
    """Check, before any training, that each rank can write a part of a checkpoint where others are.

    All ranks call this together.

    Args:
        folder: the run's folder.
        run: what writes into it, on rank 0; None on the others.
        ranks: the processes.

    Raises:
        ValueError: a rank cannot write there, or sees another folder of this name than rank 0.
    """
    if not ranks.several:
        return
    names: list[str] = []
    if run is not None:
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        names = [f"rank-{number}.{token}.part" for number in range(ranks.count)]
        run.note(*names)
    names = ranks.gathered(names)
    own = folder / names[ranks.number]
    try:
        own.touch()
    except OSError as error:
        raise ValueError(
            f"out: expected a folder that rank {ranks.number} can write into, as every rank does "
            f"with fsdp, got {error.strerror} for {printable(folder)}"
        ) from None
    ranks.gathered([True])  # all are there
    seen = ranks.of_first(lambda: [(folder / name).exists() for name in names])
    own.unlink(missing_ok=True)
    if not all(seen):
        raise ValueError(
            "out: expected one folder that all ranks see, as every rank writes into it with fsdp, "
            f"got another {printable(folder)} on rank {seen.index(False)}"
        )


def _names(folder: Path, epoch: int, count: int) -> list[tuple[str, str]]:
    """Return for each rank the name of its file, and what it is called until it is whole."""
    names: set[str] = set()
    while len(names) < count:
        name = f"checkpoint-{epoch}-{secrets.token_hex(4)}.safetensors"
        if not os.path.lexists(folder / name):
            names.add(name)
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    return [(name, f"{name}.{token}.part") for name in sorted(names)]


def _written(
    folder: Path, name: str, unfinished: str, divided: dict[str, Tensor]
) -> dict[str, Any]:
    """Write this rank's parts of tensors, and return what the index says of the file."""
    import safetensors.torch

    parts = {
        name: part_of(tensor).detach().to("cpu", copy=True).contiguous()
        for name, tensor in divided.items()
    }
    content = safetensors.torch.save(parts)
    write_file(folder / name, content, folder / unfinished)
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
