"""Which rank computes which images of a step, by the rows that each image took last time."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes.distributed.imbalance import Imbalance
from adatape_kernels.recipes.distributed.ranks import Ranks

# Ranks draw numbers of their own, as for dropout, by seeds that nothing else is made of.
_STREAM = 2
_ROWS = "rows of images"


def dealt(rows: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal images out so that each rank gets about the same number of rows.

    The image with most rows goes first, each to the rank that has fewest rows by then; of equal
    ranks to the one with fewest images, then to the first. No rank gets more than 4/3 of the best
    deal's largest sum (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).

    Args:
        rows: what each image of a batch costs.
        ranks: number of ranks.

    Returns:
        The ascending positions of each rank's images.

    Example:
        >>> from adatape_kernels.recipes.distributed.dealing import dealt
        >>> dealt([9, 5, 5, 1], 2)
        [[0, 3], [1, 2]]
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    for position in sorted(range(len(rows)), key=lambda at: -rows[at]):
        total, images, rank = heap[0]
        hands[rank].append(position)
        heapq.heapreplace(heap, (total + rows[position], images + 1, rank))
    return [sorted(hand) for hand in hands]


def in_turn(images: int, ranks: int) -> list[list[int]]:
    """Deal images out one after another, whatever they cost, as torch's DistributedSampler does."""
    return [list(range(rank, images, ranks)) for rank in range(ranks)]


def rows_tensors(rows: Tensor) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of how many rows images took; nothing where none is known."""
    return {_ROWS: rows.int()} if rows.any() else {}


def saved_rows(file: Path, tensors: Mapping[str, Tensor], images: int) -> Tensor:
    """Return how many rows each image took by a checkpoint, (images,) int64; zeros by an older one.

    Args:
        file: where the checkpoint was read, for the error.
        tensors: all of the checkpoint's.
        images: number of images in the set.

    Raises:
        ValueError: the checkpoint holds another number of images, or impossible numbers of rows.
    """
    rows = tensors.get(_ROWS)
    if rows is None:
        return torch.zeros(images, dtype=torch.long)
    if rows.shape != (images,) or rows.dtype != torch.int32 or (rows < 0).any():
        raise ValueError(
            f"{file}: expected {_ROWS} to be {images} int32 numbers of 0 or more, got others"
        )
    return rows.long()


def rows_of(output: AdaTapeOutput, own_rows: int) -> Tensor:
    """Return how many rows each image of an output took, (batch,) int64.

    They are an image's own rows and its tape tokens, or of a model that halts the sum of its own
    rows over the steps that they took part in.

    Args:
        output: what a model returned.
        own_rows: number of rows that an image has before any layer.
    """
    if output.halted is None:
        return own_rows + output.tape_lens.long()
    steps = output.halted.steps.long()
    return own_rows * steps if steps.dim() == 1 else steps.sum(1)


@dataclass(frozen=True)
class Share:
    """What one rank computes of a step's batch."""

    positions: Tensor
    """(n,) int64, its images by their positions in the batch."""
    images: int
    """Number of images in the whole batch."""
    ranks: Ranks
    dealer: "Dealer"
    indices: Tensor
    """(batch,) int64, the whole batch by its images' numbers in the set."""
    most: int
    """The most images that a rank has."""

    def taken(self, of_batch: Tensor) -> Tensor:
        """Return this rank's part of what has a row for each image of the batch.

        A rank without images takes the first image, with the weight 0, as its peers wait for its
        gradients.
        """
        return of_batch[self.positions] if len(self.positions) else of_batch[:1]

    def weight(self, part: int) -> float:
        """Return what a mean loss over so many of the images that were taken counts for."""
        return part / self.images if len(self.positions) else 0.0

    def learn(self, outputs: Sequence[AdaTapeOutput]) -> None:
        """Remember what the images took.

        Args:
            outputs: those of the parts of what was taken.
        """
        self.dealer.learn(self, outputs)


class Dealer:
    """Deals the images of each step out to the ranks, and remembers what each image took.

    An epoch is dealt by what the images took in the epoch before; in the first all images count
    alike. All ranks deal alike, so that nothing is sent for it but once at the end of an epoch.

    Args:
        forward: the model as `Execution.forward_of` yields it.
        ranks: the processes.
        images: number of images in the set.
        rows: (images,) int64, what each took when it was last seen, or 0 for one that was not;
            `end_epoch` overwrites it. None to know of none.
    """

    def __init__(self, forward: Any, ranks: Ranks, images: int, rows: Tensor | None = None):
        self.forward, self.ranks = forward, ranks
        if rows is None:
            rows = torch.zeros(images if ranks.several else 0, dtype=torch.long)
        self.rows = rows
        self._seen: list[tuple[Tensor, Tensor]] = []

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Make the numbers that a rank draws for itself, as for dropout, those of no other rank.

        Rank 0 goes on with its own, which are in the checkpoint.
        """
        self._seen = []
        if self.ranks.several and not self.ranks.leads:
            words = [seed, epoch, _STREAM, self.ranks.number]
            state = np.random.SeedSequence(words).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))

    def share(self, batch: Tensor, together: int = 1) -> Share | None:
        """Return what this rank computes of a batch; None for one process, which computes all.

        Args:
            batch: (batch,) int64, the images by their numbers in the set.
            together: number of consecutive images that go to one rank; 2 for those that are mixed
                with each other where they are prepared.
        """
        if not self.ranks.several:
            return None
        known = self.rows[batch].double()
        usual = known[known > 0].mean() if (known > 0).any() else 1.0
        costs = known.where(known > 0, usual)
        # The last images may be fewer than go together.
        missing = -len(batch) % together
        shape = (len(batch) + missing) // together, together
        costs = F.pad(costs, (0, missing)).view(shape).sum(1)
        hands = dealt(costs.tolist(), self.ranks.count)
        groups = torch.arange(len(batch) + missing).view(shape)
        positions = groups[hands[self.ranks.number]].flatten()
        positions = positions[positions < len(batch)]
        last = len(groups) - 1
        most = max(len(hand) * together - missing * (last in hand) for hand in hands)
        return Share(positions, len(batch), self.ranks, self, batch, most)

    def total(self, images: int) -> int:
        """Return the sum over all ranks of how many images each of them has."""
        device = next(self.forward.parameters()).device
        return int(self.ranks.summed(torch.tensor(images, device=device)))

    def learn(self, share: Share, outputs: Sequence[AdaTapeOutput]) -> None:
        """Remember what a share's images took, until `end_epoch` tells the others."""
        model = self.forward.module.model
        own_rows = model.config.num_patches + model.num_prefix_tokens
        rows = torch.cat([rows_of(output, own_rows) for output in outputs])
        taken = len(share.positions)  # a rank without images has computed one that is not its own
        self._seen.append((share.indices[share.positions], rows[:taken]))

    def end_epoch(self) -> Imbalance | None:
        """Bring together what all ranks have seen; return how equally it was shared out.

        Returns:
            The imbalance, or None for one process.
        """
        if not self.ranks.several or not self._seen:
            return None
        device = self._seen[0][1].device
        rows = torch.zeros(len(self.rows), dtype=torch.long, device=device)
        steps = torch.zeros(len(self._seen), self.ranks.count, dtype=torch.long, device=device)
        for step, (indices, found) in enumerate(self._seen):
            rows[indices.to(device)] = found
            steps[step, self.ranks.number] = found.sum()
        self._seen = []
        rows = self.ranks.summed(rows).cpu()
        self.rows.copy_(rows.where(rows > 0, self.rows))
        return Imbalance.of(self.ranks.summed(steps).cpu())
