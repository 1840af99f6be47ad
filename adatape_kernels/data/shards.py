"""Image sets in tar shards of WebDataset's layout, whose images are read where they lie."""

from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from adatape_kernels.data.halves import TEST_SHARE, halves_of, split_note
from adatape_kernels.data.image_file import decode_content, pillow
from adatape_kernels.data.image_folder import DECODERS
from adatape_kernels.data.image_set import ImageSet, Subset
from adatape_kernels.data.packed_paths import PackedPaths
from adatape_kernels.data.printable import printable
from adatape_kernels.data.shard_index import examples_of
from adatape_kernels.data.tar_headers import TarHeaders

CLASSES_FILE = "classes.txt"
"""A file beside the shards that has the name of each class on a line, in the order of labels."""


class ShardImages:
    """Images in shards that look like a uint8 tensor (n, 3, size, size), decoded on access.

    Any image is read by one seek, in any order; no file stays open between two accesses. Memory
    holds 28 bytes for each image, and those that were asked for.

    Args:
        shards: the tar files.
        size: side in pixels of the square that images are brought to.
        num_classes: number of classes; None where no file names them.

    Raises:
        ValueError: a shard is cut short or has a member that its layout has not, or there is no
            image; the error names the shard and the member.
    """

    def __init__(self, shards: Sequence[Path], size: int, num_classes: int | None):
        self.shards = PackedPaths(shards)
        self.size = size
        parts = [_examples(shard, num_classes) for shard in shards]
        counts = torch.tensor([len(part) for part in parts])
        self._shard = torch.arange(len(parts), dtype=torch.int32).repeat_interleave(counts)
        self._offset, self._bytes, self.labels = torch.cat(parts).T.contiguous()
        if not len(self.labels):
            raise ValueError(f"data-dir: expected images in {printable(shards[0])}, got none")

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Decode the images at indices (batch,).

        Raises:
            ValueError: an image is damaged or of another format, or a shard is no longer as it was;
                the error names the shard and the member.
        """
        with ThreadPoolExecutor(DECODERS) as pool:
            images = list(pool.map(self._decoded, indices.tolist()))
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size).byte()

    def facts(self, indices: Tensor) -> list[tuple[Path, int, int]]:
        """Return the shard, the offset and the number of bytes of images at indices (batch,)."""
        columns = (each[indices].tolist() for each in (self._shard, self._offset, self._bytes))
        return [(self.shards[shard], *rest) for shard, *rest in zip(*columns, strict=True)]

    def _decoded(self, index: int) -> Tensor:
        shard, offset, size = self.facts(torch.tensor([index]))[0]
        try:
            with shard.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise ValueError(
                f"{printable(shard)}: expected a shard that can be read, "
                f"got {error.strerror or error}"
            ) from None
        if len(content) < size:
            raise ValueError(
                f"{printable(shard)}: {_member_at(shard, offset)}: expected {size} bytes, got "
                f"{len(content)}, as the shard was cut short since it was opened"
            )
        try:
            return decode_content(content, printable(shard), self.size)
        except ValueError as error:
            name, _, rest = str(error).rpartition(": expected ")
            raise ValueError(f"{name}: {_member_at(shard, offset)}: expected {rest}") from None


def shard_set(folder: Path, size: int, seed: int) -> ImageSet:
    """Find the images of shards.

    Args:
        folder: holds train/, and beside it val/ or test/ if the test is apart, which each hold
            files *.tar; or files *.tar itself. A file `CLASSES_FILE` in it may name the classes.
        size: side in pixels of the square that images are brought to.
        seed: where there is neither, decides which fifth of the images is for the test.

    Raises:
        ValueError: there are no shards, or as in `ShardImages`.
        RuntimeError: Pillow is not installed.
    """
    pillow()
    names = _class_names(folder)
    count = None if names is None else len(names)
    train, test = halves_of(folder)
    images = ShardImages(_shards(train), size, count)
    if test is not None:
        known = _count_of(images) if count is None else count
        others = ShardImages(_shards(test), size, known)
        names = names or _numbered(known)
        return ImageSet(images, images.labels, others, others.labels, names)
    total = len(images)
    if total < 2:
        raise ValueError(f"data-dir: expected two or more images in {printable(folder)}, got one")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(TEST_SHARE * total))
    held, kept = order[:cut].sort().values, order[cut:].sort().values
    names = names or _numbered(_count_of(images))
    return ImageSet(
        Subset(images, kept),
        images.labels[kept],
        Subset(images, held),
        images.labels[held],
        names,
        notes=(split_note(folder, len(held), total, seed),),
    )


def _shards(folder: Path) -> list[Path]:
    """Return the shards of a folder in alphabetical order."""
    found = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not found:
        raise ValueError(f"data-dir: expected files *.tar in {printable(folder)}, got none")
    return found


def _class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the classes; None where no file has them."""
    file = folder / CLASSES_FILE
    if not file.is_file():
        return None
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise ValueError(f"{printable(file)}: expected text in UTF-8, got other bytes") from None
    if len(names) < 2:
        raise ValueError(
            f"{printable(file)}: expected a line for each of two or more classes, got {len(names)}"
        )
    return names


def _count_of(images: ShardImages) -> int:
    """Return the number of classes where no file names them: the largest label and one."""
    largest = int(images.labels.max())
    if largest == 0:
        raise ValueError(
            f"{printable(images.shards[0])}: expected labels of two or more classes, got 0 alone"
        )
    return largest + 1


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def _examples(shard: Path, num_classes: int | None) -> Tensor:
    """Return the offset, the number of bytes and the label of each image, (n, 3) int64."""
    numbers = array("q", chain.from_iterable(examples_of(shard, num_classes)))
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 3)


def _member_at(shard: Path, offset: int) -> str:
    """Return the name of the member whose bytes begin at an offset, for an error."""
    try:
        with TarHeaders(shard) as headers:
            name = next(member.name for member in headers if member.offset == offset)
    except (ValueError, StopIteration):
        return f"the member at byte {offset}"
    return printable(name, 100)
