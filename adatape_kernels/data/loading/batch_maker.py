"""One batch of training images, prepared from its number: what a loader's processes do."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adatape_kernels.arguments import check_int
from adatape_kernels.data.image_set import Images, Normaliser, unit_range
from adatape_kernels.data.loading.batch_draws import image_generator, order_of_epoch
from adatape_kernels.data.loading.unreadable_images import readable_images
from adatape_kernels.data.mixup import Mixture

# How many images are tried where one is needed, whichever it is.
_TRIED = 1000

Augment = Callable[[Tensor, Generator], Tensor]


class BatchPlace(NamedTuple):
    """Which images are asked for."""

    epoch: int
    """Number of the epoch, from 0 on."""
    batch: int
    """Number of the batch in its epoch, from 0 on."""
    positions: Tensor | None = None
    """(n,) int64, ascending positions in the batch; None for all of it. Images that are mixed with
    each other, the two of positions 2i and 2i + 1, are asked for together."""


class PreparedBatch(NamedTuple):
    """Images as the model takes them."""

    inputs: Tensor
    """(n, channels, height, width) float32, augmented, normalised and mixed."""
    targets: Tensor
    """(n,) int64 labels, or of mixed images (n, classes) float32, each's probability."""
    positions: Tensor
    """(n,) int64, where in the batch they stand."""
    unreadable: tuple[tuple[int, str], ...] = ()
    """The numbers of images that were left out, each with the line that names its file."""
    seconds: float = 0.0
    """What it took to prepare."""


class BatchMaker:
    """Prepares the batches of any epoch, or parts of them, in any order.

    The order of an epoch's images depends on the seed and the epoch, and what is drawn for an image
    on its number besides. So an image is the same in any part of any batch, whichever process
    prepares it. Everything that is given must be something that pickle takes where processes are
    spawned.

    Args:
        images: the training images.
        labels: (n,) int64.
        num_classes: number of classes.
        batch: number of images of a batch.
        batches: number of batches of an epoch.
        seed: that of the run.
        normalise: applied to the images after they are augmented.
        make_augment: returns what augments images; it is called once in each process.
        mixup: both parameters of the Beta distribution that images are mixed by; 0 for none.
        skip: whether an image that cannot be read is left out; otherwise it is an error.

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
    ):
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.batch = check_int("batch", batch, 1)
        self.batches = check_int("batches", batches, 0)
        self.seed = check_int("seed", seed, 0)
        self.normalise, self.make_augment = normalise, make_augment
        self.mixup, self.skip = mixup, skip
        self._augment: Augment | None = None
        self._order: tuple[int, Tensor] | None = None

    def numbers(self, epoch: int, batch: int) -> Tensor:
        """Return the images of a batch by their numbers in the set, (batch,) int64."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, order_of_epoch(len(self.labels), self.seed, epoch)
        return self._order[1][batch * self.batch :][: self.batch]

    def __getitem__(self, place: BatchPlace) -> PreparedBatch:
        """Prepare a batch, or a part of it.

        Raises:
            ValueError: an image cannot be read and is not to be skipped; the error names its file.
        """
        start = time.perf_counter()
        numbers = self.numbers(place.epoch, place.batch)
        positions = torch.arange(len(numbers)) if place.positions is None else place.positions
        numbers = numbers[positions]
        unreadable: list[tuple[int, str]] = []
        if self.skip:
            images, kept, unreadable = readable_images(self.images, numbers)
            readable = torch.isin(numbers, kept)
            positions, numbers = positions[readable], kept
        else:
            images = self.images[numbers] if len(numbers) else None
        labels = self.labels[numbers]
        if images is None:
            return PreparedBatch(torch.empty(0), labels, positions, tuple(unreadable))
        generators = [image_generator(self.seed, place.epoch, int(image)) for image in numbers]
        inputs, targets = self._augmented(unit_range(images), generators), labels
        if self.mixup:
            mixture = Mixture.of_pairs(positions, self.mixup, generators)
            inputs, targets = mixture.images(inputs), mixture.targets(labels, self.num_classes)
        seconds = time.perf_counter() - start
        return PreparedBatch(inputs, targets, positions, tuple(unreadable), seconds)

    def blank(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one image that says nothing, for a part without any.

        Raises:
            ValueError: none of the first images of the set can be read.
        """
        for image in torch.arange(min(len(self.labels), _TRIED)).split(1):
            found, kept, _ = readable_images(self.images, image)
            if found is not None:
                targets = self.labels[kept]
                if self.mixup:
                    targets = F.one_hot(targets, self.num_classes).float()
                return torch.zeros_like(unit_range(found)), targets
        raise ValueError(f"images: expected one that can be read among the first {_TRIED}")

    def _augmented(self, images: Tensor, generators: list[Generator]) -> Tensor:
        """Return images, each of which its own generator has changed, normalised."""
        if self._augment is None:
            self._augment = self.make_augment()
        pairs = zip(images.split(1), generators, strict=True)
        return self.normalise(torch.cat([self._augment(image, each) for image, each in pairs]))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what each process makes for itself."""
        return {**self.__dict__, "_augment": None, "_order": None}
