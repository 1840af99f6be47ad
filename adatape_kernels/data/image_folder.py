"""Image sets of files (JPEG, PNG, WebP, BMP), a folder a class, decoded when a batch needs them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.data.class_folders import SkippedEntries, class_files
from adatape_kernels.data.halves import TEST_SHARE, halves_of, split_note
from adatape_kernels.data.image_file import decode, pillow
from adatape_kernels.data.image_set import ImageSet
from adatape_kernels.data.packed_paths import PackedPaths
from adatape_kernels.data.printable import printable

DECODERS = 2
"""Number of threads that decode; Pillow releases the interpreter's lock meanwhile."""


class FolderImages:
    """Image files that look like a uint8 tensor (n, 3, size, size), decoded on access.

    Memory holds no more than the images that were asked for. An image is turned upright, scaled so
    that its shorter side is `size` pixels, and cut to the square in its middle.
    """

    def __init__(self, files: Sequence[Path], size: int):
        self.files = PackedPaths(files)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at indices (batch,).

        Raises:
            ValueError: a file is damaged or of another format; the error names it.
        """
        files = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(lambda file: decode(file, self.size), files))
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size).byte()


def image_folder(folder: Path, size: int, seed: int) -> ImageSet:
    """Find the images of a folder of classes.

    Args:
        folder: holds a folder of image files for each class; or it holds train/, and beside it
            val/ or test/ if the test is apart, which each hold such folders. Of both, val/ counts.
        size: side in pixels of the square that images are brought to.
        seed: where there is neither, decides which fifth of each class is for the test.

    What is skipped below the folder, as `class_files` says, stands in the set's notes, and how many
    images are for the test where the folder does not say it.

    Raises:
        ValueError: there are fewer than two classes, a class has no image or too few to split, a
            file may not be read, or the test has other classes than the training.
        RuntimeError: Pillow is not installed.
    """
    split = labelled_files(folder, seed)
    return ImageSet(
        FolderImages(split.train_files, size),
        split.train_labels,
        FolderImages(split.test_files, size),
        split.test_labels,
        split.class_names,
        notes=split.notes,
    )


class LabelledFiles(NamedTuple):
    """The image files of a folder of classes."""

    train_files: list[Path]
    """Those of all classes, class after class."""
    train_labels: Tensor
    """(n,) int64, which index class_names."""
    test_files: list[Path]
    test_labels: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    """Lines about what was skipped, and about a split, if there is anything to say."""


def labelled_files(folder: Path, seed: int) -> LabelledFiles:
    """Find the image files of a folder of classes, as `image_folder` says; none is opened.

    Raises:
        ValueError, RuntimeError: as in `image_folder`.
    """
    pillow()
    skipped = SkippedEntries()
    train, test = halves_of(folder)
    train_classes, notes = class_files(train, skipped), []
    if test is None:
        total = sum(map(len, train_classes.values()))
        train_classes, test_classes = _split(train, train_classes, seed)
        held = sum(map(len, test_classes.values()))
        notes = [split_note(folder, held, total, seed)]
    else:
        test_classes = class_files(test, skipped)
        if list(train_classes) != list(test_classes):
            odd = min(set(train_classes) ^ set(test_classes))
            raise ValueError(
                f"data-dir: expected the same classes in {printable(train)} and {printable(test)}, "
                f"got {odd!r} in one"
            )
    line = skipped.line(folder)
    return LabelledFiles(
        *_labelled(train_classes),
        *_labelled(test_classes),
        tuple(train_classes),
        (*((line,) if line else ()), *notes),
    )


def _split(
    folder: Path, classes: dict[str, list[Path]], seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return training and test files by class; of every class at least one image goes to each."""
    generator = torch.Generator().manual_seed(seed)
    train, test = {}, {}
    for name, files in classes.items():
        if len(files) < 2:
            raise ValueError(
                f"data-dir: expected two or more images in {printable(folder / name)} to split, "
                "got one"
            )
        order = torch.randperm(len(files), generator=generator).tolist()
        cut = max(1, round(TEST_SHARE * len(files)))
        test[name] = sorted(files[index] for index in order[:cut])
        train[name] = sorted(files[index] for index in order[cut:])
    return train, test


def _labelled(classes: dict[str, list[Path]]) -> tuple[list[Path], Tensor]:
    """Return the files of all classes, class after class, and their labels (n,) int64."""
    files = [file for names in classes.values() for file in names]
    counts = torch.tensor([len(names) for names in classes.values()])
    return files, torch.arange(len(counts)).repeat_interleave(counts)
