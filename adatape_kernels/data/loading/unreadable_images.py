"""Images that cannot be read: skipped and counted up to a limit."""

from collections.abc import Iterable

import torch
from torch import Tensor

from adatape_kernels.data.image_set import Images

# The number of images that are asked for at a time.
_BATCH = 16


class UnreadableImages:
    """The images of a set that could not be read, by their numbers, each counted once.

    Args:
        limit: the most that are skipped.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Count images, each by its number and the line that says why it could not be read.

        Raises:
            ValueError: these are more than the limit in all; the error names the last file.
        """
        for number, reason in found:
            self.reasons.setdefault(number, reason)
            if len(self.reasons) > self.limit:
                raise ValueError(
                    f"unreadable-limit: expected at most {self.limit} images that cannot be read, "
                    f"got {len(self.reasons)}, the last of them {reason}"
                )

    def line(self, kind: str) -> str | None:
        """Return a line that says how many images were skipped, or None for none.

        Args:
            kind: which images these are, as in "training images".
        """
        if not self.reasons:
            return None
        more = f", and {len(self) - 1} more" if len(self) > 1 else ""
        first = next(iter(self.reasons.values()))
        return f"skipped {len(self)} {kind} that cannot be read: {first}{more}"


def readable_images(
    images: Images, indices: Tensor
) -> tuple[Tensor | None, Tensor, list[tuple[int, str]]]:
    """Read images, and leave out those that cannot be read.

    Args:
        images: the images that are chosen from.
        indices: (batch,) int64, those that are asked for.

    Returns:
        The images that could be read, None for none; their indices, in the order in which they were
        asked for; and the number of each of the others with the line that names its file.
    """
    try:
        return images[indices], indices, []
    except ValueError:
        pass
    read, kept, unreadable = [], [], []
    for index in indices.split(1):
        try:
            read.append(images[index])
            kept.append(index)
        except ValueError as error:
            unreadable.append((int(index), str(error)))
    return (
        torch.cat(read) if read else None,
        torch.cat(kept) if kept else indices[:0],
        unreadable,
    )


def count_unreadable(images: Images, asked: Tensor, unreadable: UnreadableImages) -> None:
    """Read some images, and count those that cannot be read.

    Args:
        images: the images that are chosen from.
        asked: (n,) int64, the numbers of those that are read.
        unreadable: counts them.

    Raises:
        ValueError: more cannot be read than the limit allows; the error names the last file.
    """
    for indices in asked.split(_BATCH):
        unreadable.add(readable_images(images, indices)[2])
