"""Mixup: each image of a batch is mixed with another one, and its target likewise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# The sums by which numpy draws from larger ones overflow; all shares are 1/2 long before.
_MOST_ALPHA = 1e300


@dataclass(frozen=True)
class Mixture:
    """How the images of a batch are mixed.

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization; scenic
    dataset_lib/dataset_utils.py, mixup, which draws one share for a whole batch.

    Example:
        >>> import torch
        >>> from adatape_kernels.data.mixup import Mixture
        >>> mixture = Mixture(torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
        >>> mixture.targets(torch.tensor([0, 2]), num_classes=3).tolist()
        [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]]
    """

    shares: Tensor
    """(batch,) float32, each image's share of what it becomes, from 1/2 to 1."""
    others: Tensor
    """(batch,) int64, the image that each is mixed with."""

    @classmethod
    def draw(cls, batch: int, alpha: float, generator: Generator) -> "Mixture":
        """Return a mixture of each image with the one before it.

        Args:
            batch: number of images.
            alpha: above 0; the larger, the nearer are the shares to 1/2.
            generator: gives all random numbers.
        """
        return cls(_shares(batch, alpha, generator), torch.arange(batch).roll(1, 0))

    @classmethod
    def of_pairs(
        cls, positions: Tensor, alpha: float, generators: Sequence[Generator]
    ) -> "Mixture":
        """Return a mixture of those images of a batch with each other that stand at 2i and 2i + 1.

        An image whose other one is not among the images stays as it is.

        Args:
            positions: (n,) int64, ascending, where the images stand in their batch.
            alpha: above 0; the larger, the nearer are the shares to 1/2.
            generators: one for each image, which draws its share.
        """
        shares = torch.cat([_shares(1, alpha, generator) for generator in generators])
        # The other position differs in the last bit. Where it is not there, another is found.
        wanted = positions ^ 1
        found = torch.searchsorted(positions, wanted).clamp(max=len(positions) - 1)
        own = torch.arange(len(positions))
        return cls(shares, found.where(positions[found] == wanted, own))

    def images(self, images: Tensor) -> Tensor:
        """Return mixed images (batch, channels, height, width) of the same dtype and device."""
        share = self.shares.to(images).view(-1, 1, 1, 1)
        return share * images + (1 - share) * images[self.others.to(images.device)]

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return a probability of each class, (batch, num_classes) float32.

        Args:
            labels: (batch,) int64, those of the images before they were mixed.
            num_classes: number of classes.
        """
        own = F.one_hot(labels, num_classes).float()
        share = self.shares.to(own).unsqueeze(1)
        return share * own + (1 - share) * own[self.others.to(own.device)]


def _shares(count: int, alpha: float, generator: Generator) -> Tensor:
    """Return numbers of a Beta(alpha, alpha) distribution, or 1 less such a number.

    Of the two the larger is taken, which changes nothing but which of two images is named first. So
    an image's own label is always that of the larger share.
    """
    # torch draws such numbers from its default generator alone.
    seed = int(torch.randint(1 << 62, (), generator=generator))
    alpha = min(alpha, _MOST_ALPHA)
    drawn = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count))
    return torch.maximum(drawn, 1 - drawn).float()
