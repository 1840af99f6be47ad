"""What runs and what has halted in the course of a loop of steps."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.op_types import wide_dtype


@dataclass(frozen=True, eq=False, repr=False)
class HaltingState:
    """A batch that is still running, and what the steps so far made of the whole batch.

    A unit is an example or a row of the batch that the loop began with, by the rule's level. A
    state is never changed: each step returns a new one. `Halting.start` makes the first.

    Attributes:
        batch: the rows that run, and their latest states.
        initial: the batch that the loop began with.
        total: (rows, dim) of `initial`, float32 (float64 for float64), the output so far.
        origin: (rows of batch,) int32, which row of `initial` each row was; -1 for unused rows.
        examples: (examples of batch,) int64, which example of `initial` each example was.
        of_rows: whether units are rows.
        static: whether buffers keep their sizes.
        rows_per_step: how many rows each step computed, unused ones included.
        leave: the rule's, when rows leave.
        masked: whether nothing leaves, and what has halted is masked.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 4))
        >>> state = ak.halting.Halting.act().start(batch)
        >>> state.examples.tolist(), state.done
        ([0, 1], False)
    """

    batch: ElasticBatch
    initial: ElasticBatch
    total: Tensor
    origin: Tensor
    examples: Tensor
    of_rows: bool
    static: bool
    # Each has one more entry than there are units. It stands for rows that belong to none, whose
    # unit is -1.
    all_scores: Tensor
    all_remainders: Tensor
    all_updates: Tensor
    all_running: Tensor
    rows_per_step: tuple[int, ...] = ()
    leave: str = "example"
    masked: bool = False

    @classmethod
    def before(
        cls,
        batch: ElasticBatch,
        *,
        of_rows: bool,
        static: bool,
        leave: str = "example",
        masked: bool = False,
    ) -> "HaltingState":
        """Return the state before the first step.

        Args:
            batch: what the first step computes on.
            of_rows, static, leave, masked: the attributes.
        """
        device, wide = batch.device, wide_dtype(batch.dtype)
        number = torch.arange(batch.batch, device=device)
        origin = torch.arange(batch.data.shape[0], device=device, dtype=torch.int32)
        if not batch.exact:
            origin = origin.where(origin < batch.cu_tapes[-1], -1)
        # An example without rows does not run, whatever other examples of its batch do.
        running = origin >= 0 if of_rows else batch.lens > 0
        running = torch.nn.functional.pad(running, (0, 1))
        zeros = torch.zeros(running.shape, dtype=wide, device=device)
        total = torch.zeros(batch.data.shape, dtype=wide, device=device)
        updates = torch.zeros(running.shape, dtype=torch.int32, device=device)
        return cls(
            *(batch, batch, total, origin, number, of_rows, static),
            *(zeros, zeros, updates, running),
            leave=leave,
            masked=masked,
        )

    def __repr__(self) -> str:
        """Describe the state in one line, without a look at values."""
        return (
            f"{type(self).__name__}(steps={len(self.rows_per_step)}, batch={self.batch!r}, "
            f"initial={self.initial!r})"
        )

    @property
    def done(self) -> bool:
        """Whether nothing runs any more.

        With `static` buffers nobody looks, so that it is False unless there was nothing at all.
        Where halted rows stay in the batch, looking copies a number to the host.
        """
        if self.batch.batch == 0 or self.batch.data.shape[0] == 0:
            return True
        return not self.static and not bool(self.all_running.any())

    @property
    def score(self) -> Tensor:
        """(units,) the halting score h of each, float32 (float64 for float64)."""
        return self.all_scores[:-1]

    @property
    def remainders(self) -> Tensor:
        """(units,) the remainder R of each, 0 where it has not halted; differentiable."""
        return self.all_remainders[:-1]

    @property
    def updates(self) -> Tensor:
        """(units,) int32 the number of steps N that each ran."""
        return self.all_updates[:-1]

    @property
    def running(self) -> Tensor:
        """(units,) bool, which still run."""
        return self.all_running[:-1]

    @property
    def output(self) -> ElasticBatch:
        """The output so far, in the layout and dtype of `initial`; unused rows are zero."""
        return self.initial.with_data(self.total.to(self.initial.dtype))

    @property
    def rows_that_run(self) -> Tensor:
        """(rows of batch,) bool, which rows of `batch` have not halted.

        Others are there if they are unused, if rows leave by whole examples, or if nothing leaves
        because the rule is masked. What rows see of others must then be masked by it.
        """
        return self.of_rows_of_batch(self.of_units(self.all_running))

    def of_units(self, values: Tensor) -> Tensor:
        """Return the values of the units of `batch`, of those of all units and one entry more."""
        return values[self._units()]

    def with_units(
        self, *, score: Tensor, remainders: Tensor, updates: Tensor, running: Tensor
    ) -> "HaltingState":
        """Return the state with other values for the units of `batch`."""
        units = (self._units(),)
        return dataclasses.replace(
            self,
            all_scores=self.all_scores.index_put(units, score),
            all_remainders=self.all_remainders.index_put(units, remainders),
            all_updates=self.all_updates.index_put(units, updates),
            all_running=self.all_running.index_put(units, running),
        )

    def of_rows_of_batch(self, values: Tensor) -> Tensor:
        """Return values of the units of `batch` for each of its rows, 0 or False for unused ones.

        Args:
            values: (rows,) or (examples,) of `batch`, by the level.
        """
        if not self.of_rows:
            # The last entry is for unused rows, which belong to no example.
            values = torch.nn.functional.pad(values, (0, 1))[self.batch.example_of_rows()]
        return values if self.batch.exact else values.masked_fill(self.origin < 0, 0)

    def after(self, total: Tensor, data: Tensor) -> "HaltingState":
        """Return the state with another output and other states of the rows of `batch`."""
        return dataclasses.replace(
            self,
            batch=self.batch.with_data(data),
            total=total,
            rows_per_step=(*self.rows_per_step, data.shape[0]),
        )

    def without_halted(self, by_rows: bool) -> "HaltingState":
        """Let halted rows leave the batch.

        Args:
            by_rows: whether rows leave one by one, rather than with all others of their example.
        """
        batch = self.batch
        if by_rows or self.static:
            keep = self.rows_that_run
            if not by_rows:
                keep = self._of_running_examples(keep)
            kept, source = self._kept_in_place(keep) if self.static else batch.keep(keep)
            return dataclasses.replace(self, batch=kept, origin=self._origin_of(kept, source))
        keep = self.of_units(self.all_running)
        if self.of_rows:
            per_example = keep.new_zeros(batch.batch + 1, dtype=torch.int32)
            keep = per_example.index_add(0, batch.example_of_rows(), keep.to(torch.int32))[:-1] > 0
        kept, source = batch.keep_examples(keep)
        return dataclasses.replace(
            self,
            batch=kept,
            origin=self._origin_of(kept, source),
            examples=self.examples[keep],
        )

    def _origin_of(self, kept: ElasticBatch, source: Tensor) -> Tensor:
        """Return the row of `initial` that each row of a batch was; -1 for unused rows.

        Args:
            kept: rows of `batch`, and unused ones behind them.
            source: the row of `batch` that each was; -1, or no entry, for unused rows.
        """
        origin = self.origin[source].where(source >= 0, -1)
        unused = kept.data.shape[0] - source.shape[0]
        return torch.nn.functional.pad(origin, (0, unused), value=-1)

    def _kept_in_place(self, keep: Tensor) -> tuple[ElasticBatch, Tensor]:
        """Return what `ElasticBatch.keep` does, of as many rows as there are, and its source.

        Without tape rows nothing is copied to the host: the number of input rows stays that of the
        first batch, and those behind the last example's are unused.
        """
        batch = self.batch
        data, cu_inputs, cu_tapes, source = ops.compact_rows(
            batch.data, keep, batch.cu_inputs, batch.cu_tapes, capacity=batch.data.shape[0]
        )
        rows = batch.num_input_rows if batch.max_tapes == 0 else int(cu_inputs[-1])
        kept = dataclasses.replace(
            batch,
            data=data,
            cu_inputs=cu_inputs,
            cu_tapes=cu_tapes,
            num_input_rows=rows,
            min_inputs=0,
            exact=False,
        )
        return kept, source

    def _of_running_examples(self, rows: Tensor) -> Tensor:
        """Return which rows of `batch` belong to an example one of whose rows is among these."""
        example = self.batch.example_of_rows()
        number = rows.new_zeros(self.batch.batch + 1, dtype=torch.int32)
        number = number.index_add(0, example, rows.to(torch.int32))
        return (number > 0)[example] & (example < self.batch.batch)

    def _units(self) -> Tensor:
        """Return the unit of each row or example of `batch`; -1 for the rows that have none."""
        return self.origin.long() if self.of_rows else self.examples
