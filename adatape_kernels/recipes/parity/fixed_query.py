"""The ablation of the recursion: a reader whose query stays what it was at first."""

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers import TapeReader
from adatape_kernels.op_types import TapeSelection


class FixedQueryReader(TapeReader):
    """A TapeReader that looks for the same thing at each step.

    It reads, weighs, halts and is charged as a TapeReader; only the sixth part of a step, moving
    the query, is left out. So what it reads are the best pairs of the bank, in their order.

    Source: SPEC 3; the recursion is what the authors credit for parity.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.recipes.parity.fixed_query import FixedQueryReader
        >>> reader = FixedQueryReader(8, num_tape_tokens=4, topk=2, halt_threshold=99.0)
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 5, 8))
        >>> x, selection = reader(x, torch.randn(2, 30, 8))
        >>> selection.counts.tolist()
        [4, 4]
    """

    def forward(  # type: ignore[override]  # the models call it with an ElasticBatch alone
        self,
        x: ElasticBatch,
        bank: Tensor | None = None,
        *,
        bank_lens: Tensor | None = None,
        capacity: int | None = None,
    ) -> tuple[ElasticBatch, TapeSelection]:
        """Read and append, as a TapeReader does."""
        pooled = x.pool("token" if self.query == "token" else "mean")
        values, query, read_mask = self.normalised(bank, pooled)
        selection = self._select(query[:, : self.key_dim], values, read_mask, bank_lens)
        tape, offsets = ops.tape_gather(
            values, selection.indices, selection.weights, selection.counts, capacity=capacity
        )
        exact = capacity is None
        y = x.append_tape(
            tape.to(x.data.dtype), offsets, max_tapes=self.num_tape_tokens, exact=exact
        )
        return y, selection

    def _select(
        self, query: Tensor, values: Tensor, read_mask: Tensor | None, bank_lens: Tensor | None
    ) -> TapeSelection:
        """Take the steps one by one; those of an example that has halted are set back to unused."""
        keys = values[..., : self.key_dim].contiguous()
        shape = len(query), keys.shape[-2]
        read = torch.zeros(shape, dtype=torch.bool, device=query.device)
        read = read if read_mask is None else read | read_mask
        halting = torch.zeros(len(query), device=query.device)
        steps = []
        for _ in range(self.num_tape_tokens):
            step = ops.tape_select(
                query,
                keys,
                num_tape_tokens=1,
                topk=self.topk,
                halt_threshold=torch.inf,
                loss_type=self.loss_type,
                read_mask=read,
                bank_lens=bank_lens,
            )
            goes_on = (halting < self.halt_threshold) & (step.counts > 0)
            steps.append(
                TapeSelection(
                    step.indices.where(goes_on[:, None, None], -1),
                    step.weights.where(goes_on[:, None, None], 0),
                    goes_on.to(step.counts.dtype),
                    step.ponder.where(goes_on, 0),
                )
            )
            halting = halting + steps[-1].weights.detach()[:, 0, 0]
            chosen = step.indices[:, 0].long().clamp(min=0)
            # An example that has halted reads nothing any more, whatever is hidden from it.
            read = read.scatter(1, chosen, True)
        if not steps:
            unused = query.new_zeros(len(query), 0, self.topk, dtype=torch.float32)
            counts = torch.zeros(len(query), dtype=torch.int32, device=query.device)
            return TapeSelection(unused.int(), unused, counts, query.new_zeros(len(query)).float())
        return TapeSelection(
            torch.cat([step.indices for step in steps], 1),
            torch.cat([step.weights for step in steps], 1),
            torch.stack([step.counts for step in steps]).sum(0, dtype=torch.int32),
            torch.stack([step.ponder for step in steps]).sum(0),
        )
