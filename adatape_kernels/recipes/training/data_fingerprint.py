"""Facts by which an image set is recognised, so that a run goes on with the images it began with.

Labels and images in memory are hashed whole. Of images that are files, the names within the set's
folder and the sizes are hashed and not the contents, which would all have to be read; of images in
shards, the names of the shards, and where in them the images lie.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.image_folder import FolderImages
from adatape_kernels.data.image_set import Images, Subset
from adatape_kernels.data.loading import ReadAhead
from adatape_kernels.data.printable import printable
from adatape_kernels.data.shards import ShardImages
from adatape_kernels.recipes.checkpoint import INDEX, Checkpoint

HASHED = {
    "train_labels_sha256": "training labels",
    "test_labels_sha256": "test labels",
    "train_images_sha256": "training images",
    "test_images_sha256": "test images",
}
"""The facts that are hashes, and what each is one of."""

_BATCH = 1000
_SHOWN_CHARACTERS = 200


def data_facts(data: ImageSet, normalise: Normaliser, root: Path | None) -> dict[str, Any]:
    """Return the facts of an image set, in the types that JSON gives back.

    Args:
        data: the image set.
        normalise: mean and standard deviation of its training images.
        root: the set's folder, within which files are named; None where it has none.
    """
    return {
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "class_names": list(data.class_names),
        "mean": list(normalise.mean),
        "std": list(normalise.std),
        "train_labels_sha256": _sha256_of_tensors(data.train_labels),
        "test_labels_sha256": _sha256_of_tensors(data.test_labels),
        "train_images_sha256": _sha256_of_images(data.train_images, root),
        "test_images_sha256": _sha256_of_images(data.test_images, root),
    }


def facts_of_ranks(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all ranks have to have found of the images, by what an error calls it.

    What images are normalised by is left out, as it follows from them, but for rounding.
    """
    found = {}
    for name, value in facts.items():
        if name in HASHED:
            found[f"data-dir: hash of the {HASHED[name]}"] = f"{value[:16]}…"
        elif name not in ("mean", "std"):
            found[f"data-dir: {name.replace('_', ' ')}"] = value
    return found


def check_facts(out: Path, saved: Checkpoint, facts: Mapping[str, Any], steps: int) -> None:
    """Raise ValueError where the images are not those that a run was started with.

    Args:
        out: the run's folder, for errors.
        saved: its last checkpoint.
        facts: those of the images now, by `data_facts`.
        steps: number of steps that an epoch over them takes.
    """
    file = out / INDEX
    for name, value in facts.items():
        if name in HASHED:
            # In format 1 there are no hashes, and numbers and names are compared alone.
            if saved.format > 1 and saved.data.get(name) != value:
                raise ValueError(
                    f"data-dir: expected the {HASHED[name]} that the run of {file} began with, "
                    "got others"
                )
        elif saved.data.get(name) != value:
            raise ValueError(
                f"data-dir: expected the images of {file} with {name} "
                f"{printable(saved.data.get(name), _SHOWN_CHARACTERS)}, "
                f"got {printable(value, _SHOWN_CHARACTERS)}"
            )
    if saved.step != saved.epoch * steps:
        raise ValueError(
            f"{file}: expected step {saved.epoch * steps} at the end of epoch {saved.epoch}, "
            f"got {shown(saved.step)}"
        )


def _sha256_of_images(images: Images, root: Path | None) -> str:
    chosen = torch.arange(len(images))
    while isinstance(images, Subset | ReadAhead):
        if isinstance(images, Subset):
            chosen = images.chosen[chosen]
        images = images.images
    if isinstance(images, FolderImages):
        return _sha256_of_files([images.files[index] for index in chosen.tolist()], root)
    if isinstance(images, ShardImages):
        return _sha256_of_members(images, chosen, root)
    return _sha256_of_tensors(*(images[indices] for indices in chosen.split(_BATCH)))


def _sha256_of_tensors(*tensors: Tensor) -> str:
    """Return the hash of the dtype, the shapes and the numbers of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _sha256_of_files(files: list[Path], root: Path | None) -> str:
    """Return the hash of the names and the sizes of files, in their order."""
    found = hashlib.sha256()
    for file in files:
        name = file if root is None else os.path.relpath(file, root)
        found.update(os.fsencode(name) + b"\0%d\0" % file.stat().st_size)
    return found.hexdigest()


def _sha256_of_members(images: ShardImages, chosen: Tensor, root: Path | None) -> str:
    """Return the hash of the shards' names and of the places of images in them, in their order."""
    found = hashlib.sha256()
    for indices in chosen.split(_BATCH):
        for shard, offset, size in images.facts(indices):
            name = shard if root is None else os.path.relpath(shard, root)
            found.update(os.fsencode(name) + b"\0%d %d\0" % (offset, size))
    return found.hexdigest()
