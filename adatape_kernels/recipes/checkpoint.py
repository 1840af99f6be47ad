"""Checkpoints of a training run: checkpoint-N.safetensors and checkpoint.json, which names it.

The tensors are written first, to a file named after the epoch, then checkpoint.json, which holds
the name, the size and the SHA-256 of that file and a SHA-256 of itself; only then is the previous
epoch's file removed. Each file is written under a temporary name in the same folder, flushed to the
disk and renamed. So whenever the power fails, the process is killed or the disk is full,
checkpoint.json names a whole file, that of the last epoch that was saved.

The entry "format" says which format checkpoint.json has. Format 1, that of version 0.1, has no
SHA-256 of itself, no hashes of the images and labels among its facts, and former names of options.
Format 3 has "parts" besides, the files of tensors that are divided by their rows among several
processes; format 2 is written where there are none.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.arguments import shown
from adatape_kernels.recipes.checkpoint_index import (
    DIVIDED_FORMAT,
    FORMAT,
    FORMATS,
    INDEX,
    KEPT_ENTRIES,
    OPTIONAL_ENTRIES,
    content_of,
    current_files,
    files_of,
    parsed,
    sealed,
)
from adatape_kernels.recipes.devices import device_of
from adatape_kernels.recipes.distributed.checkpoint_parts import joined
from adatape_kernels.recipes.distributed.divided_parameters import is_part
from adatape_kernels.recipes.model_tensors import (
    MODEL,
    average_tensors,
    below,
    check_like,
    restore_average,
)
from adatape_kernels.recipes.run_folder import RunFolder, claim

_OPTIMIZER, _RNG, _GPU_RNG = "optimizer.", "rng", "rng of the gpu"


@dataclass(frozen=True)
class Checkpoint:
    """A training run at the end of an epoch."""

    epoch: int
    """Number of epochs that the run has behind it."""
    step: int
    """Number of steps of the optimizer that the run has behind it."""
    config: dict[str, Any]
    """The options that decide the curve, by name."""
    data: dict[str, Any]
    """Facts by which the image set is recognised."""
    history: list[dict[str, Any]]
    """The metrics of each epoch."""
    environment: dict[str, Any]
    """Versions, threads and backend, on which the last bits of the curve depend."""
    tensors: dict[str, Tensor] = field(repr=False)
    """The parameters and the states of the optimizer and of torch's generator, by name."""
    format: int = FORMATS[FORMAT]
    """Number of the format that it was read in."""
    extended: list[Any] = field(default_factory=list)
    """Behind which epochs the run got another number of epochs, as `saved_run.extended` has it."""
    best: dict[str, Any] | None = None
    """The epoch that was best on the test images, as `best_model.best_entry` has it."""


def save(
    where: RunFolder | Path, checkpoint: Checkpoint, parts: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write a checkpoint; the previous one in the folder stays whole until this one is.

    Args:
        where: what writes into the folder; a path is claimed for as long as this takes.
        checkpoint: what is written.
        parts: the files of tensors that are divided, which `where` has noted: the entries of the
            index by name.

    Raises:
        ValueError: another process writes into the folder.
        OSError: a file cannot be written; the error names it.
    """
    if isinstance(where, Path):
        with claim(where) as run:
            save(run, checkpoint, parts)
        return
    if not parts:
        remove_leftovers(where)
    import safetensors.torch

    # The bytes are held in memory once, so that what is hashed is what is written.
    content = safetensors.torch.save(checkpoint.tensors)
    name = where.unused_name(f"checkpoint-{checkpoint.epoch}", ".safetensors")
    try:
        previous = current_files(where.folder)
    except ValueError:  # its index was damaged meanwhile, and so nothing is known of it
        previous = []
    # Whether we are killed before or after the index is written: one of the two is left over.
    where.note(name, *previous)
    entries = {key: getattr(checkpoint, key) for key in (*KEPT_ENTRIES, *OPTIONAL_ENTRIES)}
    index = {
        "format": DIVIDED_FORMAT if parts else FORMAT,
        "file": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **({"parts": list(parts)} if parts else {}),
        **{key: value for key, value in entries.items() if value or key in KEPT_ENTRIES},
    }
    try:
        where.write(name, content)
        where.write(INDEX, sealed(index))
    except BaseException:
        remove_leftovers(where)
        raise
    where.clear(keep=files_of(index))


def remove_leftovers(run: RunFolder) -> None:
    """Remove what a save that did not end has left, but nothing that the checkpoint needs."""
    try:
        run.clear(keep=current_files(run.folder))
    except ValueError:
        pass  # Where the index is damaged, a file that it named may still be of use.


def require(folder: Path) -> None:
    """Raise ValueError unless a folder holds a checkpoint, whole or not."""
    if not (folder / INDEX).exists():
        raise ValueError(f"resume: expected {folder / INDEX}, got no such file")


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint that a folder holds, also while a process writes the next one.

    Raises:
        ValueError: there is none, or it is cut, altered or of another format; the error names the
            file.
    """
    index_file = folder / INDEX
    while True:
        require(folder)
        content = content_of(index_file)
        index = parsed(index_file, content)
        found, file = [], folder
        try:
            for each in (index, *index.get("parts", ())):
                file = folder / each["file"]
                found.append(_tensors(file, each["bytes"], each["sha256"]))
        except FileNotFoundError:
            # Who has written a newer checkpoint meanwhile has removed the tensors of this one.
            if index_file.is_file() and content_of(index_file) != content:
                continue
            raise ValueError(f"{file}: expected the tensors of {INDEX}, got no such file") from None
        tensors, *parts = found
        tensors |= joined(index_file, parts)
        return Checkpoint(
            **{name: index[name] for name in (*KEPT_ENTRIES, *OPTIONAL_ENTRIES) if name in index},
            tensors=tensors,
            format=FORMATS[index["format"]],
        )


def _tensors(file: Path, size: int, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file of this size in bytes and this hash.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another one.
    """
    # The kernels can be tested and measured without safetensors.
    import safetensors.torch
    from safetensors import SafetensorError

    content = content_of(file)
    if len(content) != size:
        raise ValueError(f"{file}: expected {shown(size)} bytes, got {len(content)}")
    came = hashlib.sha256(content).hexdigest()
    if came != sha256:
        raise ValueError(f"{file}: expected SHA-256 {shown(sha256[:16])}..., got {came[:16]}...")
    try:
        return safetensors.torch.load(content)
    # Sizes that no tensor can have make torch raise TypeError, OverflowError or RuntimeError.
    except (SafetensorError, UnicodeDecodeError, TypeError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["damage"])[0]
        raise ValueError(f"{file}: expected safetensors, got {reason}") from None


def tensors_of(
    model: nn.Module, optimizer: Optimizer, averaged: AveragedModel | None = None
) -> dict[str, Tensor]:
    """Return copies on the CPU of the tensors that a run needs to go on, by name.

    They are those of the model, of the optimizer's state and of the moving average of the model's
    parameters, if there is one, and the state of torch's generator, and of that of the GPU where
    the model is on one. What is divided among several processes is returned as it is.
    """
    tensors = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    if averaged is not None:
        tensors |= average_tensors(averaged)
    tensors[_RNG] = torch.get_rng_state()
    device = device_of(model)
    if device.type == "cuda":
        tensors[_GPU_RNG] = torch.cuda.get_rng_state(device)
    return {
        name: tensor if is_part(tensor) else tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def restore(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: Optimizer,
    averaged: AveragedModel | None = None,
) -> None:
    """Put a checkpoint's tensors into the model, the optimizer and torch's generator.

    Args:
        folder: where the checkpoint was read, for errors.
        tensors: as `tensors_of` returned them.
        model: a model of the same configuration, on any device.
        optimizer: an AdamW of the model's parameters.
        averaged: the moving average of the model's parameters, if the run has one.

    Raises:
        ValueError: the tensors are those of another model or optimizer.
    """
    weights = below(tensors, MODEL)
    check_like(folder / INDEX, weights, model)
    if averaged is not None:
        restore_average(folder / INDEX, tensors, averaged)
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        entries = _state_of(tensors, f"{_OPTIMIZER}{name}.")
        if entries:
            # AdamW's count of steps is a float32 scalar; its moments are like the parameter.
            like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            fits = entries.keys() == like.keys() and all(
                (v.shape, v.dtype) == (like[k].shape, like[k].dtype) for k, v in entries.items()
            )
            if not fits:
                raise ValueError(
                    f"{folder / INDEX}: expected step, exp_avg and exp_avg_sq for {name}, "
                    f"got {', '.join(sorted(entries))} of other shapes, dtypes or names"
                )
            state[index] = entries
    try:
        torch.set_rng_state(tensors[_RNG])
        device = device_of(model)
        if device.type == "cuda" and _GPU_RNG in tensors:
            torch.cuda.set_rng_state(tensors[_GPU_RNG], device)
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(
            f"{folder / INDEX}: expected the state of torch's generator, got none that fits"
        ) from None
    model.load_state_dict(weights)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _state_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what the optimizer keeps of a parameter, by the names that AdamW has for it.

    Only names without a further dot are returned, since the name of one parameter may begin with
    that of another.
    """
    return {name: tensor for name, tensor in below(tensors, prefix).items() if "." not in name}
