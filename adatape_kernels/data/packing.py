"""Batches of examples of many lengths, packed so that each has about as many rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int, check_kind, check_tensor
from adatape_kernels.data.aspect_folder import AspectImages
from adatape_kernels.data.image_set import Normaliser, unit_range

OPEN_BATCHES = 32
"""Number of batches that are filled at a time."""


def packed_indices(
    lens: Sequence[int] | Tensor, max_rows: int, *, seed: int = 0
) -> Iterator[list[int]]:
    """Yield the examples of batches that have at most so many rows, each example once.

    Examples are taken in a random order. Each joins the first open batch that has room for it
    (first fit). Where none has, a new batch is opened; when OPEN_BATCHES are open, the fullest is
    yielded before. At the end all open batches are yielded, so that the last ones may be emptier.

    Args:
        lens: rows of each example, 0 or more.
        max_rows: most rows of a batch.
        seed: decides the order; the same seed gives the same batches.

    Raises:
        ValueError: an example alone has more rows than a batch may have, or a number is negative.
        TypeError: an argument is of another type altogether.

    Example:
        >>> from adatape_kernels.data import packed_indices
        >>> batches = list(packed_indices([5, 3, 2, 4, 6], max_rows=10))
        >>> sorted(index for batch in batches for index in batch)
        [0, 1, 2, 3, 4]
    """
    if isinstance(lens, Tensor):
        if lens.dim() != 1 or lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lens: expected int32 or int64 (n,), got {lens.dtype} {tuple(lens.shape)}"
            )
        lens = lens.tolist()
    elif isinstance(lens, str) or not isinstance(lens, Sequence):
        raise TypeError(f"lens: expected a sequence of ints, got {type(lens).__name__}")
    rows = [check_int("lens", each) for each in lens]
    max_rows = check_int("max_rows", max_rows, 1)
    generator = torch.Generator().manual_seed(check_int("seed", seed))
    longest = max(rows, default=0)
    if longest > max_rows:
        raise ValueError(
            f"max_rows: expected at least {longest} (the rows of example {rows.index(longest)}), "
            f"got {max_rows}"
        )
    return _first_fit(rows, torch.randperm(len(rows), generator=generator).tolist(), max_rows)


def _first_fit(rows: list[int], order: list[int], max_rows: int) -> Iterator[list[int]]:
    shortest = min(rows, default=0)
    batches: list[list[int]] = []
    room: list[int] = []
    for example in order:
        need = rows[example]
        place = next((i for i, free in enumerate(room) if free >= need), None)
        if place is None:
            if len(batches) == OPEN_BATCHES:
                fullest = room.index(min(room))
                del room[fullest]
                yield batches.pop(fullest)
            place = len(batches)
            batches.append([])
            room.append(max_rows)
        batches[place].append(example)
        room[place] -= need
        if room[place] < shortest:
            del room[place]
            yield batches.pop(place)
    yield from batches


def packed_batches(
    images: AspectImages,
    labels: Tensor,
    *,
    max_rows: int,
    extra_rows: int = 1,
    seed: int = 0,
    normalise: Normaliser | None = None,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield batches of images of many sizes with their labels, packed by `packed_indices`.

    Args:
        images: the images of an `AspectFolder`, for training or for the test.
        labels: (n,) int64, their labels.
        max_rows: most rows of a batch. It bounds memory and time, not the number of images.
        extra_rows: rows that an image has beside its patches: 1 for the class token, more for
            registers and, where tapes are to be counted, num_tape_tokens for each read.
        seed: decides the order; the number of the epoch, for one.
        normalise: applied to each image after it is brought to 0 to 1; without it images are uint8.

    Yields:
        A list of images (3, height, width), as a model takes it, and labels (batch,).

    Raises:
        ValueError: an image alone has more rows than a batch may have, a number is out of range, or
            there are more labels or fewer than images.
        TypeError: an argument is of another type altogether.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> def steps(photos, max_rows=4096, epochs=10):
        ...     normalise = ak.data.Normaliser.of(photos.train_images)
        ...     for epoch in range(epochs):
        ...         yield from ak.data.packed_batches(
        ...             photos.train_images, photos.train_labels,
        ...             max_rows=max_rows, seed=epoch, normalise=normalise,
        ...         )
    """
    check_kind("images", images, AspectImages)
    check_tensor("labels", labels)
    if labels.dim() != 1 or len(labels) != len(images):
        raise ValueError(f"labels: expected ({len(images)},), got {tuple(labels.shape)}")
    extra_rows = check_int("extra_rows", extra_rows)
    if normalise is not None:
        check_kind("normalise", normalise, Normaliser)
    batches = packed_indices(images.patch_counts + extra_rows, max_rows, seed=seed)
    return _decoded(images, labels, batches, normalise)


def _decoded(
    images: AspectImages,
    labels: Tensor,
    batches: Iterator[list[int]],
    normalise: Normaliser | None,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    for batch in batches:
        indices = torch.tensor(batch)
        pictures = images[indices]
        if normalise is not None:
            pictures = [normalise(unit_range(picture)) for picture in pictures]
        yield pictures, labels[indices]
