"""One batch of training images, prepared from its number: what a loader's processes do."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from adatape_kernels.arguments import check_int
from adatape_kernels.data.image_set import Images, Normaliser, unit_range
from adatape_kernels.data.loading.batch_draws import batch_generator, order_of_epoch
from adatape_kernels.data.loading.unreadable_images import readable_images
from adatape_kernels.data.mixup import Mixture

Augment = Callable[[Tensor, Generator], Tensor]


class PreparedBatch(NamedTuple):
    """Images as the model takes them."""

    inputs: Tensor
    """(batch, channels, height, width) float32, augmented, normalised and mixed."""
    targets: Tensor
    """(batch,) int64 labels, or of mixed images (batch, classes) float32, each's probability."""
    unreadable: tuple[tuple[int, str], ...] = ()
    """The numbers of images that were left out, each with the line that names its file."""
    seconds: float = 0.0
    """What it took to prepare."""


class BatchMaker:
    """Prepares the batches of any epoch, in any order.

    The order of an epoch's images depends on the seed and the epoch, and what is drawn for a batch
    on its number and the rank besides. Everything that is given must be something that pickle
    takes where processes are spawned.

    Args:
        images: the training images.
        labels: (n,) int64.
        num_classes: number of classes.
        batch: number of images of a batch, of all ranks together.
        batches: number of batches of an epoch.
        seed: that of the run.
        normalise: applied to the images after they are augmented.
        make_augment: returns what augments images; it is called once in each process.
        mixup: both parameters of the Beta distribution that images are mixed by; 0 for none.
        skip: whether an image that cannot be read is left out; otherwise it is an error.
        rank: number of this process among those that share each batch.
        ranks: number of those processes. Each has a part of consecutive images of a batch, and
            the parts' sizes differ by at most one.

    Raises:
        ValueError: a number is out of range.
        TypeError: a number is no int.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        *,
        num_classes: int,
        batch: int,
        batches: int,
        seed: int,
        normalise: Normaliser,
        make_augment: Callable[[], Augment],
        mixup: float = 0.0,
        skip: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.batch = check_int("batch", batch, 1)
        self.batches = check_int("batches", batches, 0)
        self.seed = check_int("seed", seed, 0)
        self.normalise, self.make_augment = normalise, make_augment
        self.mixup, self.skip = mixup, skip
        self.ranks = check_int("ranks", ranks, 1)
        self.rank = check_int("rank", rank, 0, ranks - 1)
        self._augment: Augment | None = None
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, place: tuple[int, int]) -> PreparedBatch:
        """Prepare this rank's part of a batch.

        Args:
            place: the numbers of the epoch and of the batch in it, both from 0 on.

        Raises:
            ValueError: an image cannot be read and is not to be skipped; the error names its file.
        """
        start = time.perf_counter()
        epoch, number = place
        chosen = self._chosen(epoch, number)
        unreadable: list[tuple[int, str]] = []
        if self.skip:
            images, chosen, unreadable = readable_images(self.images, chosen)
        else:
            images = self.images[chosen] if len(chosen) else None
        labels = self.labels[chosen]
        if images is None:
            return PreparedBatch(torch.empty(0), labels, tuple(unreadable))
        if self._augment is None:
            self._augment = self.make_augment()
        generator = batch_generator(self.seed, epoch, number, self.rank)
        inputs = self.normalise(self._augment(unit_range(images), generator))
        targets = labels
        if self.mixup:
            mixture = Mixture.draw(len(labels), self.mixup, generator)
            inputs, targets = mixture.images(inputs), mixture.targets(labels, self.num_classes)
        return PreparedBatch(inputs, targets, tuple(unreadable), time.perf_counter() - start)

    def _chosen(self, epoch: int, number: int) -> Tensor:
        """Return the numbers of the images of this rank's part of a batch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, order_of_epoch(len(self.labels), self.seed, epoch)
        of_all = self._order[1][number * self.batch :][: self.batch]
        return of_all.tensor_split(self.ranks)[self.rank]

    def __getstate__(self) -> dict[str, object]:
        """Leave out what each process makes for itself."""
        return {**self.__dict__, "_augment": None, "_order": None}
