"""Images that worker processes decode ahead of an evaluation."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adatape_kernels.data.image_set import Images, Subset
from adatape_kernels.data.loading.guarded_workers import GuardedWorkers

_ASKED = 32
"""The number of images that a worker is asked for at a time, few enough for all to have some."""


@dataclass(frozen=True)
class ReadAhead:
    """Images of which `image_set.read_in_order` has worker processes decode batch after batch.

    Decoded images hold integers, so that they are the same whoever decodes them. Outside of such a
    pass there are no processes, and images are decoded where they are asked for.
    """

    images: Images
    """The images, which are files."""
    workers: int
    """Most processes that decode them."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the images at int64 indices (batch,)."""
        return self.images[indices]

    @contextlib.contextmanager
    def in_order(self, batches: Sequence[Tensor]) -> Iterator[Iterator[Tensor]]:
        """Give the context of a pass over batches, each (batch,) int64, in their order.

        Raises, with what it yields:
            ValueError: an image cannot be read; the error names its file.
            RuntimeError: a worker process was ended.
        """
        asked = [part for batch in batches for part in batch.split(_ASKED)]
        workers = min(self.workers, len(asked) - 1)
        if workers < 1:
            yield (self.images[batch] for batch in batches)
            return
        with GuardedWorkers(self.images, asked, workers) as found:
            found.begin()
            yield (_joined(found, len(batch.split(_ASKED))) for batch in batches)


def decoded_ahead(images: Images, workers: int) -> Images:
    """Return images that workers decode in a pass over them.

    Args:
        images: any; those in memory stay as they are.
        workers: number of processes; 0 for none.
    """
    files = images
    while isinstance(files, Subset):
        files = files.images
    return images if isinstance(files, Tensor) or not workers else ReadAhead(images, workers)


def _joined(found: GuardedWorkers, parts: int) -> Tensor:
    return torch.cat([found.next() for _ in range(parts)])
