"""The processes that train together, as torchrun's environment describes them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.models.value_checks import as_integer

Found = TypeVar("Found")

_NONE = torch.arange(0)
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """The processes that share each step, of which this is one; by default it is the only one.

    Example:
        >>> from adatape_kernels.recipes.distributed.ranks import Ranks
        >>> Ranks.of_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
        Ranks(number=1, count=2, local=1, restarts=0)
    """

    number: int = 0
    """The rank of this process, from 0 on."""
    count: int = 1
    """Number of processes on all machines together."""
    local: int = 0
    """Number of this process on its machine, by which it takes a GPU."""
    restarts: int = 0
    """How often torchrun has started all of them anew."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> "Ranks":
        """Return what torchrun has set, or a single process where it has set nothing.

        Args:
            environment: the variables; None for those of the process.

        Raises:
            ValueError: a variable is missing or no number in its range.
        """
        found = os.environ if environment is None else environment
        if "RANK" not in found or "WORLD_SIZE" not in found:
            return cls()

        def number(name: str, least: int, most: int, default: str | None = None) -> int:
            text = found.get(name, default)
            if text is None or not text.isdecimal():
                raise ValueError(f"{name}: expected a number from torchrun, got {shown(text)}")
            return as_integer(name, int(text), least, most)

        count = number("WORLD_SIZE", 1, _MOST_RANKS)
        return cls(
            number("RANK", 0, count - 1),
            count,
            number("LOCAL_RANK", 0, count - 1, "0"),
            number("TORCHELASTIC_RESTART_COUNT", 0, _MOST_RANKS, "0"),
        )

    @property
    def several(self) -> bool:
        """Whether there is another process."""
        return self.count > 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.number == 0

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, which each of them gets; it is overwritten."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def summing(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to do what `summed` does, and return what waits for the sum and returns it."""
        if not self.several:
            return lambda: tensor
        work: Any = dist.all_reduce(tensor, async_op=True)

        def found() -> Tensor:
            work.wait()
            return tensor

        return found

    def gathered(self, found: list[Found]) -> list[Found]:
        """Return what all ranks have found, in their order, which each of them gets."""
        if not self.several:
            return found
        of_ranks: list[Any] = [None] * self.count
        dist.all_gather_object(of_ranks, found)
        return [each for some in of_ranks for each in some]

    def of_first(self, make: Callable[[], Found]) -> Found:
        """Return what rank 0 makes, which each rank gets; the others make nothing."""
        (found,) = self.gathered([make()] if self.leads else [])
        return found

    def own(self, total: int) -> Tensor:
        """Return int64 indices of this rank's share of so many things, each count-th of them."""
        return torch.arange(self.number, total, self.count) if total > self.number else _NONE

    def check_agreement(self, found: Mapping[str, Any]) -> None:
        """Raise ValueError on every rank unless all ranks have found the same.

        No rank returns before all have called this.

        Args:
            found: what this rank has found, by the names that stand in the error; numbers, texts
                and what is made of them.
        """
        first, *others = self.gathered([dict(found)])
        for rank, other in enumerate(others, start=1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise ValueError(
                        f"{name}: expected the same on every rank, got {shown(first.get(name))} on "
                        f"rank 0 and {shown(other.get(name))} on rank {rank}"
                    )


ALONE = Ranks()
"""A process that shares its steps with no other."""
