"""How unequally the rows of an epoch's steps were shared out among the ranks."""

from dataclasses import dataclass

from torch import Tensor

RANK_METRICS = ("processes", "rows_per_rank", "most_rows", "idle_share")
"""What an epoch's metrics hold beside those of one process, where there are several."""


@dataclass(frozen=True)
class Imbalance:
    """Rows of an epoch, of which each step waits for the rank that has most.

    Example:
        >>> import torch
        >>> from adatape_kernels.recipes.distributed.imbalance import Imbalance
        >>> Imbalance.of(torch.tensor([[10, 30], [10, 10]])).idle_share
        0.25
    """

    processes: int
    """Number of ranks."""
    rows_per_rank: float
    """Rows that a rank computes in a step, on average."""
    most_rows: float
    """Rows of the rank that has most of them in a step, on average over the steps."""

    @classmethod
    def of(cls, rows: Tensor) -> "Imbalance":
        """Return the imbalance of rows (steps, ranks)."""
        rows = rows.double()
        return cls(rows.shape[1], rows.mean().item(), rows.amax(1).mean().item())

    @property
    def idle_share(self) -> float:
        """Share of their time that ranks wait for another, if time goes with rows."""
        return 1 - self.rows_per_rank / self.most_rows if self.most_rows else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the values of RANK_METRICS."""
        return {name: getattr(self, name) for name in RANK_METRICS}

    def words(self) -> str:
        """Return what the line of an epoch says."""
        return (
            f"{self.processes} ranks of {self.rows_per_rank:,.0f} rows a step, "
            f"{self.idle_share:.1%} idle"
        )
