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
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.arguments import shown
from adatape_kernels.recipes.devices import device_of
from adatape_kernels.recipes.distributed.checkpoint_parts import check_parts, joined
from adatape_kernels.recipes.distributed.divided_parameters import is_part
from adatape_kernels.recipes.model_tensors import (
    MODEL,
    average_tensors,
    below,
    check_like,
    restore_average,
)
from adatape_kernels.recipes.run_folder import RunFolder, claim

FORMATS = {f"adatape-kernels training checkpoint, {number}": number for number in (1, 2, 3)}
"""The formats that can be read, by what checkpoint.json calls them; the last two are written."""
FORMAT, _DIVIDED_FORMAT = list(FORMATS)[1:]
INDEX = "checkpoint.json"

_TENSORS = re.compile(r"checkpoint-[0-9]+(-[0-9a-f]{8})?\.safetensors")
# The end of checkpoint.json. The SHA-256 is that of the file with zeros in its place.
_SEAL = re.compile(rb'"sha256 of this file": "([0-9a-f]{64})"\n\}\n\Z')
_SEALED = "sha256 of this file"
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
        previous = _current(where.folder)
    except ValueError:  # its index was damaged meanwhile, and so nothing is known of it
        previous = []
    # Whether we are killed before or after the index is written: one of the two is left over.
    where.note(name, *previous)
    where.write(name, content)
    entries = {key: getattr(checkpoint, key) for key in (*_KEPT, *_OPTIONAL)}
    index = {
        "format": _DIVIDED_FORMAT if parts else FORMAT,
        "file": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **({"parts": list(parts)} if parts else {}),
        **{key: value for key, value in entries.items() if value or key in _KEPT},
    }
    where.write(INDEX, sealed(index))
    where.clear(keep=_files(index))


def remove_leftovers(run: RunFolder) -> None:
    """Remove what a save that did not end has left, but nothing that the checkpoint needs."""
    try:
        run.clear(keep=_current(run.folder))
    except ValueError:
        pass  # Where the index is damaged, a file that it named may still be of use.


def _files(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that hold an index's tensors."""
    return [index["file"], *(part["file"] for part in index.get("parts", ()))]


def _current(folder: Path) -> list[str]:
    """Return the names of the tensors' files of a folder's checkpoint; none where there is none.

    Raises:
        ValueError: checkpoint.json is damaged.
    """
    try:
        content = _read(folder / INDEX)
    except FileNotFoundError:
        return []
    return _files(_parsed(folder / INDEX, content))


def sealed(index: Mapping[str, Any]) -> bytes:
    """Return the content of checkpoint.json, which holds a SHA-256 of itself."""
    content = (json.dumps({**index, _SEALED: 64 * "0"}, indent=1) + "\n").encode()
    found = _SEAL.search(content)
    assert found is not None
    return _with_digest(content, found, hashlib.sha256(content).hexdigest().encode())


def _with_digest(content: bytes, found: re.Match[bytes], digest: bytes) -> bytes:
    return content[: found.start(1)] + digest + content[found.end(1) :]


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
        content = _read(index_file)
        index = _parsed(index_file, content)
        found, file = [], folder
        try:
            for each in (index, *index.get("parts", ())):
                file = folder / each["file"]
                found.append(_tensors(file, each["bytes"], each["sha256"]))
        except FileNotFoundError:
            # Who has written a newer checkpoint meanwhile has removed the tensors of this one.
            if index_file.is_file() and _read(index_file) != content:
                continue
            raise ValueError(f"{file}: expected the tensors of {INDEX}, got no such file") from None
        tensors, *parts = found
        tensors |= joined(index_file, parts)
        return Checkpoint(
            **{name: index[name] for name in (*_KEPT, *_OPTIONAL) if name in index},
            tensors=tensors,
            format=FORMATS[index["format"]],
        )


def _read(file: Path) -> bytes:
    """Return a file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; the error names it.
    """
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file}: expected a file, got something else")
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{file}: expected a file that can be read, got {error.strerror}"
        ) from None


def _parsed(index_file: Path, content: bytes) -> dict[str, Any]:
    """Return the entries of checkpoint.json.

    Raises:
        ValueError: it is cut, altered or of another format; the error names the file.
    """
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["too deep a nesting"])[0]
        raise ValueError(f"{index_file}: expected whole JSON, got {reason}") from None
    came = index.get("format") if isinstance(index, dict) else None
    if not isinstance(came, str) or came not in FORMATS:
        raise ValueError(f"{index_file}: expected the format {FORMAT!r}, got {shown(came)}")
    # An altered byte may also make it look like format 1, in which there is no such entry.
    if FORMATS[came] > 1 or _SEALED in index:
        found = _SEAL.search(content)
        whole = b"" if found is None else _with_digest(content, found, 64 * b"0")
        if found is None or hashlib.sha256(whole).hexdigest().encode() != found[1]:
            raise ValueError(f"{index_file}: expected its own SHA-256, got that of another content")
    for name, kind in {**_ENTRIES, **_OPTIONAL}.items():
        if name in _OPTIONAL and name not in index:
            continue
        if type(index.get(name)) is not kind or (name in _OPTIONAL and not index[name]):
            raise ValueError(
                f"{index_file}: expected {name} of type {kind.__name__}, "
                f"got {shown(index.get(name))}"
            )
    if FORMATS[came] == 3:
        check_parts(index_file, index.get("parts"))
    else:
        index.pop("parts", None)
    # The name comes from a file, which must not make us read outside of the folder.
    for name in _files(index):
        if not _TENSORS.fullmatch(name):
            raise ValueError(
                f"{index_file}: expected file of the form checkpoint-N.safetensors, "
                f"got {shown(name)}"
            )
    for name in ("epoch", "step", "bytes"):
        if index[name] < 0:
            raise ValueError(f"{index_file}: expected {name} of 0 or more, got {index[name]}")
    if index["epoch"] != len(index["history"]):
        raise ValueError(
            f"{index_file}: expected epoch to be the length of history, {len(index['history'])}, "
            f"got {shown(index['epoch'])}"
        )
    return index


_ENTRIES: dict[str, type] = {
    "file": str,
    "bytes": int,
    "sha256": str,
    "epoch": int,
    "step": int,
    "config": dict,
    "data": dict,
    "history": list,
    "environment": dict,
}
_KEPT = ("epoch", "step", "config", "data", "history", "environment")
# Entries that runs of earlier versions lack, and that are written where there is something to say.
_OPTIONAL: dict[str, type] = {"extended": list, "best": dict}


def _tensors(file: Path, size: int, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file of this size in bytes and this hash.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another one.
    """
    # The kernels can be tested and measured without safetensors.
    import safetensors.torch
    from safetensors import SafetensorError

    content = _read(file)
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
