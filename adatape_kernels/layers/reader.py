"""Reading a tape from a bank of tokens and appending it to each example (SPEC 2 to 5)."""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from adatape_kernels import ops
from adatape_kernels.arguments import check_flag, check_int, check_number, shown
from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.layer_checks import check_rate, check_size, checked_bank
from adatape_kernels.layers.recomputed_bank import (
    RecomputedBank,
    is_large,
    plain_backward_pass,
    reads_little,
    recomputed,
    rows_of_selection,
)
from adatape_kernels.layers.row_kinds import Rows, as_batch, in_kind
from adatape_kernels.layers.spare_rows import called_with_spare_rows
from adatape_kernels.layers.stopped_reads import check_threshold, stopped_at
from adatape_kernels.layers.torch_modules import NORM_EPS, is_plain, xavier_linear
from adatape_kernels.op_types import LossType, TapeSelection
from adatape_kernels.ops.reading_checks import MAX_TOPK
from adatape_kernels.ops.tape_read import tape_read_again

QueryType = Literal["token", "gap"]
"""What a read looks for: the class token, or the mean over the example's rows."""

_POOLING: dict[str, Literal["token", "mean"]] = {"token": "token", "gap": "mean"}


class ReadBudget(NamedTuple):
    """What limits a read.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.layers.reader.ReadBudget(halt_threshold=2.0, num_tape_tokens=10).num_tape_tokens
        10
    """

    halt_threshold: float | Tensor
    """An example reads on while its halting score is below this."""
    num_tape_tokens: int
    """Most tape tokens that an example reads."""


def given_limits(
    halt_threshold: float | Tensor | None, num_tape_tokens: int | None
) -> dict[str, Any]:
    """Return those of a read's limits that are not None, as keyword arguments of a reader.

    What is not asked for is not passed on, since a reader of the user's own may not know it.
    """
    limits = {"halt_threshold": halt_threshold, "num_tape_tokens": num_tape_tokens}
    return {name: limit for name, limit in limits.items() if limit is not None}


class TapeReader(ElasticModule):
    """Reads tape tokens from a bank and appends them to each example.

    Args:
        dim: width of a token.
        num_tape_tokens: most tape tokens that one read appends to an example.
        topk: number of bank tokens that are merged into one tape token.
        halt_threshold: an example reads on while its halting score is below this.
        bank_size: number of tokens of a learnable bank, the parameter `tape_tokens`; 0 when the
            caller brings banks.
        key_split: the key of a bank token is its first dim // key_split features.
        query: "token" reads with the class token, "gap" with the mean over the example's rows.
        average_query: whether a new query is the mean of the last one and of what it read, or
            what it read alone.
        loss_type: how a read is charged, "entropy" or "max", as in `ops.tape_select`.
        tape_mlp_dim: hidden width of a GLU feed-forward, the module `tape_mlp`, that tape tokens
            pass before they are appended; 0 for none.
        query_noise: standard deviation of the noise that training adds to the query.
        bank_dropout: probability with which training hides a bank token from an example.

    Raises:
        ValueError: a size is too small, topk is more than 32 or than a learnable bank has, a rate
            is no probability, loss_type is unknown, query is neither "token" nor "gap", or
            key_split is not within 1 to dim.
        TypeError: an argument is of another type altogether.

    Source: SPEC 2 to 5.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> reader = ak.layers.TapeReader(
        ...     dim=8, num_tape_tokens=4, topk=2, halt_threshold=99.0, bank_size=30
        ... )
        >>> x, selection = reader(ak.ElasticBatch.from_padded(torch.randn(3, 5, 8)))
        >>> x.lens.tolist(), selection.indices.shape
        ([9, 9, 9], torch.Size([3, 4, 2]))
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tape_tokens: int,
        topk: int,
        halt_threshold: float,
        bank_size: int = 0,
        key_split: int = 1,
        query: QueryType = "token",
        average_query: bool = True,
        loss_type: LossType = "entropy",
        tape_mlp_dim: int = 0,
        query_noise: float = 0.0,
        bank_dropout: float = 0.0,
    ):
        super().__init__()
        dim = check_size("dim", dim)
        num_tape_tokens = check_size("num_tape_tokens", num_tape_tokens, 0)
        topk = check_int("topk", topk, 1, MAX_TOPK)
        check_number("halt_threshold", halt_threshold, finite=False)
        bank_size = check_size("bank_size", bank_size, 0)
        key_split = check_int("key_split", key_split, None)
        check_flag("average_query", average_query)
        tape_mlp_dim = check_size("tape_mlp_dim", tape_mlp_dim, 0)
        check_number("query_noise", query_noise, 0)
        check_rate("bank_dropout", bank_dropout)
        if 0 < bank_size < topk:
            raise ValueError(f"bank_size: expected 0 or at least topk = {topk}, got {bank_size}")
        if loss_type not in ("entropy", "max"):
            raise ValueError(f"loss_type: expected 'entropy' or 'max', got {shown(loss_type)}")
        if query not in ("token", "gap"):
            raise ValueError(f"query: expected 'token' or 'gap', got {shown(query)}")
        if not 1 <= key_split <= dim:
            raise ValueError(f"key_split: expected 1 to dim = {dim}, got {key_split}")
        self.num_tape_tokens = num_tape_tokens
        self.topk = topk
        self.halt_threshold = halt_threshold
        self.dim = dim
        self.key_dim = dim // key_split
        self.query = query
        self.average_query = average_query
        self.loss_type = loss_type
        self.query_noise = query_noise
        self.bank_dropout = bank_dropout
        self.bank_norm = nn.LayerNorm(dim, NORM_EPS)
        self.tape_tokens: nn.Parameter | None = None
        if bank_size:
            self.tape_tokens = nn.Parameter(torch.empty(bank_size, dim))
            nn.init.normal_(self.tape_tokens, std=0.02)
        self.tape_mlp = (
            nn.Sequential(
                xavier_linear(dim, 2 * tape_mlp_dim), nn.GLU(), xavier_linear(tape_mlp_dim, dim)
            )
            if tape_mlp_dim
            else None
        )

    def forward(
        self,
        x: Rows,
        bank: Tensor | RecomputedBank | None = None,
        *,
        bank_lens: Tensor | None = None,
        capacity: int | None = None,
        halt_threshold: float | Tensor | None = None,
        num_tape_tokens: int | None = None,
    ) -> tuple[Rows, TapeSelection]:
        """Read from the bank and append the tape tokens that were read.

        Args:
            x: the batch, with no norm applied to it: an ElasticBatch, a Tensor
                (batch, seqlen, dim), a pair (Tensor, mask), whose mask is True where a row is
                valid, or a jagged Tensor.
            bank: (batch, bank_size, dim) or (bank_size, dim), with no norm applied to it; None
                for the learnable bank.
            bank_lens: (batch,) integers, how many leading tokens of each example's bank are
                valid; None when all are.
            capacity: number of tape rows to reserve for the whole batch (capacity mode, which
                never synchronises); None for exactly those that are read, which copies one number
                to the host.
            halt_threshold, num_tape_tokens: in the place of the reader's own, for this call; None
                leaves them. A scalar tensor as the threshold is not waited for; all steps are then
                selected, and those beyond the threshold are left out.

        Returns:
            The batch with the tape appended, and what was read: indices and weights
            (batch, num_tape_tokens, topk), counts and ponder losses (batch,). The batch is of the
            kind of x. A pair is what `ElasticBatch.to_padded` gives, and a plain tensor is the
            first of that pair: for each example its input rows, the `counts` tape rows that it
            read, and zeros. With a capacity both have num_tape_tokens rows more than x.

        Raises:
            TypeError: x is none of these.
            ValueError: there is no bank, a mask does not match, num_tape_tokens is negative, or as
                in `ops.tape_read`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=99.0)
            >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 5, 8))
            >>> bank, bank_lens = torch.randn(2, 30, 8), torch.tensor([30, 5])
            >>> x, selection = reader(x, bank, bank_lens=bank_lens)
            >>> selection.counts.tolist()  # five tokens give two pairs
            [4, 2]
        """
        batch = as_batch(x, self.dim)
        query = batch.pool(_POOLING[self.query])
        budget = self.budget(halt_threshold, num_tape_tokens)
        tape, offsets, selection = self._read(bank, query, bank_lens, capacity, budget)
        tape = tape.to(batch.data.dtype)
        if self.tape_mlp is not None:
            tape = called_with_spare_rows(self.tape_mlp, tape)
        exact = capacity is None
        y = batch.append_tape(tape, offsets, max_tapes=budget.num_tape_tokens, exact=exact)
        if self.tape_mlp is not None:
            y = y.with_data(y.clear_unused(y.data))
        return in_kind(y, x, batch, appended=True, static=not exact), selection

    if TYPE_CHECKING:
        __call__ = forward

    def _read(
        self,
        bank: Tensor | RecomputedBank | None,
        query: Tensor,
        bank_lens: Tensor | None,
        capacity: int | None,
        budget: "ReadBudget",
    ) -> tuple[Tensor, Tensor, TapeSelection]:
        """Return tape, offsets and selection, as `ops.tape_read` does."""
        if self._may_copy_rows_of(bank, query):
            bank = recomputed(cast(Tensor, bank))
        threshold = budget.halt_threshold
        later = threshold if isinstance(threshold, Tensor) else None  # known when the ops run
        options: Any = {
            "topk": self.topk,
            "num_tape_tokens": budget.num_tape_tokens,
            "halt_threshold": threshold if later is None else math.inf,
            "average_query": self.average_query,
            "loss_type": self.loss_type,
            "bank_lens": bank_lens,
        }
        if not isinstance(bank, RecomputedBank):
            values, query, read_mask = self.normalised(bank, query)
            query, options["read_mask"] = query[:, : self.key_dim], read_mask
            if later is None:
                return ops.tape_read(query, values, **options, capacity=capacity)
            # The gradients of the keys and of the values are those of one bank.
            rows, values = values, values.detach()
            with torch.no_grad():
                selection = ops.tape_select(query, values[..., : self.key_dim], **options)
                selection = stopped_at(selection, later, self.loss_type)
            return tape_read_again(
                query,
                rows,
                values,
                selection,
                average_query=self.average_query,
                loss_type=self.loss_type,
                capacity=capacity,
                places=selection.indices,
            )
        entries = checked_bank(bank.entries, query)
        query, read_mask = self._regularised(query, entries)
        with torch.no_grad():
            values = self.bank_norm(entries)
        query = self.bank_norm(query).to(values.dtype)[:, : self.key_dim]
        with torch.no_grad():
            keys = values[..., : self.key_dim]
            selection = ops.tape_select(query, keys, **options, read_mask=read_mask)
            if later is not None:
                selection = stopped_at(selection, later, self.loss_type)
        rows = self.bank_norm(bank.rows(*rows_of_selection(selection.indices, entries.shape[1])))
        return tape_read_again(
            query,
            rows,
            values,
            selection,
            average_query=self.average_query,
            loss_type=self.loss_type,
            capacity=capacity,
        )

    def budget(
        self, halt_threshold: float | Tensor | None = None, num_tape_tokens: int | None = None
    ) -> "ReadBudget":
        """Return the reader's own limits, or those that stand in their place.

        Args:
            halt_threshold, num_tape_tokens: as in `forward`.

        Raises:
            ValueError: num_tape_tokens is negative, or halt_threshold is NaN.
            TypeError: one is no number.

        Example:
            >>> import adatape_kernels as ak
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=2.0)
            >>> reader.budget(num_tape_tokens=1)
            ReadBudget(halt_threshold=2.0, num_tape_tokens=1)
        """
        if halt_threshold is None:
            halt_threshold = self.halt_threshold
        elif isinstance(halt_threshold, Tensor):
            check_threshold(halt_threshold)
        else:
            check_number("halt_threshold", halt_threshold, finite=False)
        if num_tape_tokens is None:
            num_tape_tokens = self.num_tape_tokens
        else:
            num_tape_tokens = check_size("num_tape_tokens", num_tape_tokens, 0)
        return ReadBudget(halt_threshold, num_tape_tokens)

    def may_recompute(self, bank_size: int) -> bool:
        """Return whether banks of such a size may come as a `RecomputedBank`.

        Args:
            bank_size: number of entries of each example's bank.

        Example:
            >>> import adatape_kernels as ak
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=2.0)
            >>> reader.may_recompute(100), reader.may_recompute(10)
            (True, False)
        """
        return (
            plain_backward_pass()
            and reads_little(bank_size, self.num_tape_tokens, self.topk)
            and is_plain(self.bank_norm, nn.LayerNorm)
            and self.bank_norm.eps > 0  # the rows where nothing was read are zero before the norm
            and type(self).normalised is TapeReader.normalised
            and "normalised" not in self.__dict__
        )

    def _may_copy_rows_of(self, bank: Any, query: Tensor) -> bool:
        return (
            type(bank) in (Tensor, nn.Parameter)
            and bank.dim() == 3
            and plain_backward_pass()
            and any(each.requires_grad for each in (bank, query, *self.bank_norm.parameters()))
            and self.may_recompute(bank.shape[1])
            # The last question: a compiler makes its answer a condition on the batch.
            and is_large(bank.numel(), bank.device.type, from_patches=False)
        )

    def normalised(
        self, bank: Tensor | None, query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what the ops take: a normalised bank, a normalised query and a mask.

        Args:
            bank: as in `forward`.
            query: (batch, dim), pooled from the examples.

        Returns:
            The bank, in its own shape; the query (batch, dim), in training with noise added to it
            before the norm; and the mask (batch, bank_size) of the bank tokens that training hides
            from an example, or None.

        Raises:
            ValueError: there is no bank, or its shape does not fit the query's.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=2.0)
            >>> bank, query, mask = reader.normalised(torch.randn(30, 8), torch.randn(2, 8))
            >>> bank.shape, query.shape, mask
            (torch.Size([30, 8]), torch.Size([2, 8]), None)
        """
        bank = checked_bank(self.tape_tokens if bank is None else bank, query)
        query, read_mask = self._regularised(query, bank)
        values, query = self.bank_norm(bank), self.bank_norm(query)
        return values, query.to(values.dtype), read_mask

    def _regularised(self, query: Tensor, bank: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the query and the mask of hidden entries; in training both are random."""
        if self.training and self.query_noise > 0:
            query = query + self.query_noise * torch.randn_like(query)
        read_mask = None
        if self.training and self.bank_dropout > 0:
            chance = torch.rand(query.shape[0], bank.shape[-2], device=query.device)
            read_mask = chance < self.bank_dropout
        return query, read_mask

    def extra_repr(self) -> str:
        """Return how much is read and when reading stops, as a printed module shows it.

        Example:
            >>> import adatape_kernels as ak
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=2.0)
            >>> reader.extra_repr()
            'num_tape_tokens=4, topk=2, halt_threshold=2, query=token'
        """
        return (
            f"num_tape_tokens={self.num_tape_tokens}, topk={self.topk}, "
            f"halt_threshold={self.halt_threshold:g}, query={self.query}"
        )
