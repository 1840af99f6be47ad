"""Checkpoints of a training run: checkpoint-N.safetensors and checkpoint.json, which names it.

The tensors are written first, to a file named after the epoch, then checkpoint.json, which holds
the name, the size and the SHA-256 of that file; only then is the previous epoch's file removed.
Each file is written under a temporary name in the same folder, flushed to the disk and renamed. So
whenever the power fails, the process is killed or the disk is full, checkpoint.json names a whole
file, that of the last epoch that was saved.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = "adatape-kernels training checkpoint, 1"
INDEX = "checkpoint.json"

# Answers by which a file system says that it cannot flush, and not that flushing failed. Network
# mounts, folders shared with a virtual machine and those that programs provide give them.
_CANNOT_FLUSH = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EISDIR,
    errno.ENOTTY,
    errno.EROFS,
}

_TENSORS = re.compile(r"checkpoint-\d+\.safetensors")
_MODEL, _OPTIMIZER, _RNG = "model.", "optimizer.", "rng"


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


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the previous one in the folder stays whole until this one is.

    Raises:
        OSError: a file cannot be written; the error names it.
    """
    # The bytes are held in memory once, so that what is hashed is what is written.
    content = safetensors.torch.save(checkpoint.tensors)
    file = folder / f"checkpoint-{checkpoint.epoch}.safetensors"
    write_file(file, content)
    entries = {key: value for key, value in vars(checkpoint).items() if key != "tensors"}
    index = {
        "format": FORMAT,
        "file": file.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **entries,
    }
    write_file(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    for other in folder.glob("checkpoint-*.safetensors*"):
        if other != file:
            other.unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint that a folder holds.

    Raises:
        ValueError: there is none, or it is cut, altered or of another format; the error names the
            file.
    """
    index_file = folder / INDEX
    try:
        index = json.loads(index_file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"resume: expected {index_file}, got no such file") from None
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["too deep a nesting"])[0]
        raise ValueError(f"{index_file}: expected whole JSON, got {reason}") from None
    came = index.get("format") if isinstance(index, dict) else None
    if came != FORMAT:
        raise ValueError(f"{index_file}: expected the format {FORMAT!r}, got {came!r}")
    for name, kind in _ENTRIES.items():
        if type(index.get(name)) is not kind:
            raise ValueError(
                f"{index_file}: expected {name} of type {kind.__name__}, got {index.get(name)!r}"
            )
    # The name comes from a file, which must not make us read outside of the folder.
    if not _TENSORS.fullmatch(index["file"]):
        raise ValueError(
            f"{index_file}: expected file of the form checkpoint-N.safetensors, "
            f"got {index['file']!r}"
        )
    if not 0 <= index["epoch"] == len(index["history"]):
        raise ValueError(
            f"{index_file}: expected epoch to be the length of history, {len(index['history'])}, "
            f"got {index['epoch']}"
        )
    tensors = _read_tensors(folder / index["file"], index["bytes"], index["sha256"])
    kept = ("epoch", "step", "config", "data", "history", "environment")
    return Checkpoint(**{name: index[name] for name in kept}, tensors=tensors)


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


def _read_tensors(file: Path, size: int, sha256: str) -> dict[str, Tensor]:
    """Read a safetensors file of this size in bytes and this hash. Raises ValueError."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file}: expected the tensors of {INDEX}, got no such file") from None
    if len(content) != size:
        raise ValueError(f"{file}: expected {size} bytes, got {len(content)}")
    came = hashlib.sha256(content).hexdigest()
    if came != sha256:
        raise ValueError(f"{file}: expected SHA-256 {sha256[:16]}..., got {came[:16]}...")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected safetensors, got {str(error).splitlines()[0]}"
        ) from None


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies of the tensors that a run needs to go on, by name.

    They are those of the model, of the optimizer's state, and the state of torch's generator.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    tensors[_RNG] = torch.get_rng_state()
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def restore(
    folder: Path, tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer
) -> None:
    """Put a checkpoint's tensors into the model, the optimizer and torch's generator.

    Args:
        folder: where the checkpoint was read, for errors.
        tensors: as `tensors_of` returned them.
        model: a model of the same configuration.
        optimizer: an AdamW of the model's parameters.

    Raises:
        ValueError: the tensors are those of another model or optimizer.
    """
    weights = _below(tensors, _MODEL)
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = (
            tuple(found[name].shape) if name in found else "none" for found in (expected, weights)
        )
        if ours != theirs:
            raise ValueError(
                f"{folder / INDEX}: expected {name} of shape {ours}, as the model has, got {theirs}"
            )
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        entries = _below(tensors, f"{_OPTIMIZER}{name}.")
        if entries:
            # AdamW's count of steps is a scalar; its moments have the shape of the parameter.
            wrong = [k for k, v in entries.items() if v.dim() and v.shape != parameter.shape]
            if wrong or entries.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(
                    f"{folder / INDEX}: expected step, exp_avg and exp_avg_sq for {name}, "
                    f"got {', '.join(sorted(entries))} of other shapes or names"
                )
            state[index] = entries
    try:
        torch.set_rng_state(tensors[_RNG])
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(
            f"{folder / INDEX}: expected the state of torch's generator, got none that fits"
        ) from None
    model.load_state_dict(weights)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names.

    Below a parameter of the optimizer's state only names without a further dot are returned, since
    the name of one parameter may begin with that of another.
    """
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if prefix.startswith(_OPTIMIZER):
        return {name: tensor for name, tensor in found.items() if "." not in name}
    return found


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and through to the disk.

    Raises:
        OSError: it cannot be written; the error names it, and an earlier file of that name stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            _flush(stream.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(
            f"{path}: expected to write {len(content)} bytes, got {error.strerror or error}"
        ) from None


def _flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, and so a rename within it; only POSIX systems can."""
    if os.name == "posix":
        with _where_it_can_be_done():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                _flush(descriptor)
            finally:
                os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Flush a file or a folder to the disk, where its file system can."""
    with _where_it_can_be_done():
        os.fsync(descriptor)


@contextlib.contextmanager
def _where_it_can_be_done() -> Iterator[None]:
    """Go on where a file system answers that it cannot flush; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
