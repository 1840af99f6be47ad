"""Numbers on what a model reads of a labelled set: places, steps, classes, entries and lengths."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.op_types import TapeSelection


@dataclass(frozen=True)
class PlacesRead:
    """Where an image is read, of a bank of its own patches."""

    by_class: Tensor
    """(classes, side, side) float64, the share of a class's images that read each patch."""
    over_all: Tensor
    """(side, side) float64, the same of all images."""
    by_step: Tensor
    """(num_tape_tokens, side, side) float64, of the images that take a step, the share that read
    each patch in it; 0 where none takes it."""
    images_by_step: Tensor
    """(num_tape_tokens,) int64, the number of images that take each step."""
    centre_share: float
    """Share of all reads that fall on the patches of the middle, NaN where nothing is read."""
    centre_share_by_step: Tensor
    """(num_tape_tokens,) float64, the same of the reads of each step, NaN where none takes it."""
    uniform_share: float
    """What it would be if every patch were read alike."""


def middle(side: int) -> Tensor:
    """Return (side, side) bool, the patches in the middle half of the image along either axis."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    inside = (centres > 0.25) & (centres < 0.75)
    return inside[:, None] & inside[None, :]


def places_read(read: TapeSelection, labels: Tensor, classes: int, side: int) -> PlacesRead:
    """Return where images are read.

    Args:
        read: of all images, with indices of side · side patches, row by row.
        labels: (images,) int64.
        classes: number of classes.
        side: number of patches along either axis.
    """
    images, steps, _ = read.indices.shape
    marks = torch.zeros(images, steps, side * side + 1, dtype=torch.float64)
    indices = read.indices.long()
    # The index -1, where nothing was read, goes to a column of its own, which is dropped.
    marks.scatter_(2, indices.where(indices >= 0, side * side), 1)
    marks = marks[..., :-1]
    per_image = marks.amax(1) if steps else marks.new_zeros(images, side * side)
    taking = (indices >= 0).any(2).sum(0)
    by_class = torch.stack(
        [
            per_image[labels == c].mean(0) if (labels == c).any() else per_image.new_zeros(side**2)
            for c in range(classes)
        ]
    )
    by_step = marks.sum(0)
    total, inside = by_step.sum(1), by_step[:, middle(side).flatten()].sum(1)
    return PlacesRead(
        by_class.unflatten(1, (side, side)),
        per_image.sum(0).div(max(1, images)).unflatten(0, (side, side)),
        (by_step / taking.clamp(min=1)[:, None]).unflatten(1, (side, side)),
        taking,
        (inside.sum() / total.sum()).item(),
        inside / total,
        middle(side).double().mean().item(),
    )


@dataclass(frozen=True)
class EntriesRead:
    """Which entries of a learnable bank are read."""

    counts: Tensor
    """(bank_size,) int64, how often each entry is read."""
    by_class: Tensor
    """(classes, bank_size) int64, the same by the class of the image."""
    dead: int
    """Number of entries that nobody reads."""
    entropy: float
    """Entropy of the reads over the entries, in bits; at most log2(bank_size)."""
    class_information: float
    """What an entry that is read says of the image's class, on average over the reads, in bits: 0
    where all classes read alike, and at most log2(classes)."""


def entries_read(read: TapeSelection, labels: Tensor, classes: int, bank_size: int) -> EntriesRead:
    """Return which entries are read.

    Args:
        read: of all images.
        labels: (images,) int64.
        classes: number of classes.
        bank_size: number of entries.
    """
    indices = read.indices.flatten(1).long()
    chosen = indices >= 0
    classes_of_reads = labels[:, None].expand_as(indices)[chosen]
    flat = classes_of_reads * bank_size + indices[chosen]
    by_class = flat.bincount(minlength=classes * bank_size).view(classes, bank_size)
    counts = by_class.sum(0)
    entropy = entropy_bits(counts)
    # The mutual information of class and entry: H(class) + H(entry) - H(class, entry).
    information = entropy_bits(by_class.sum(1)) + entropy - entropy_bits(by_class.flatten())
    return EntriesRead(counts, by_class, int((counts == 0).sum()), entropy, max(0.0, information))


def entropy_bits(counts: Tensor) -> float:
    """Return the entropy in bits of a distribution that is given by counts, 0 of none."""
    shares = counts[counts > 0].double() / counts.sum().clamp(min=1)
    return -(shares * shares.log2()).sum().item() + 0.0


@dataclass(frozen=True)
class LengthsRead:
    """How long tapes are, and of which images they are longer; NaN where there is no such image."""

    mean: float
    right: float
    """Mean over the images that are classified right."""
    wrong: float
    noisy: float
    """Mean over all images with noise added to them."""
    blurred: float
    """Mean over all images, blurred."""
    correlation_with_loss: float
    """Pearson's correlation of tape length and cross-entropy over the images, NaN where either is
    the same for all."""

    def entries(self) -> dict[str, Any]:
        """Return what report.json holds, which knows no NaN."""
        return {name: known(value) for name, value in vars(self).items()}


def known(value: float) -> float | None:
    """Return a value, None in the place of NaN."""
    return None if value != value else value


def mean_of(lengths: Tensor) -> float:
    """Return the mean of tape lengths, NaN of none."""
    return lengths.double().mean().item()


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two tensors (n,), NaN where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return (a @ b / scale).item() if scale > 0 else torch.nan
