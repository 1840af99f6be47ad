"""ElasticBatch: a batch whose examples own different numbers of rows (SPEC 5).

`ElasticLayout` says where the rows of an example lie, and `ElasticSources`, which extends it, how a
batch is made; here stands how a batch is taken apart, appended to, shrunk and pooled.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from adatape_kernels.arguments import check_int, shown
from adatape_kernels.elastic_examples import (
    ElasticExample,
    example_at,
    examples_of,
)
from adatape_kernels.elastic_kept import with_examples_kept, with_rows_kept
from adatape_kernels.elastic_sources import ElasticSources
from adatape_kernels.layout_checks import checked_tape_offsets
from adatape_kernels.offsets import (
    can_be_seen,
    cumulative,
    packed_order,
)
from adatape_kernels.pooling import Pooling, pool_rows
from adatape_kernels.reentrant_checkpoint import refuse_reentrant_checkpoint


@dataclass(frozen=True, eq=False, repr=False)
class ElasticBatch(ElasticSources):
    """A batch of token sequences of any lengths, each with input rows and tape rows.

    Make one with `from_padded`, `from_packed`, `from_nested`, `from_examples` or `from_offsets`;
    the constructor trusts its arguments. The input rows of all examples come first, example after
    example, then the tape rows of all examples. In capacity mode unused rows follow, which belong
    to no example.

    Its length is the number of examples, of which an empty batch has none and is false. Iteration
    and an index give an `ElasticExample`, and a slice gives a batch; they copy the offsets to the
    host. It moves and changes its dtype as a tensor does, by `to`, `half` and their like, while the
    offsets stay int32. Batches are equal (`==`) only if they are the same object.

    It is a pytree node of torch, whose leaves are its attributes in their order. A checkpoint takes
    one with use_reentrant=False; the reentrant form, which gives gradients to bare tensors only, is
    refused with RuntimeError.

    Attributes:
        data: (rows, dim), of any floating dtype and on any device.
        cu_inputs: (batch + 1,) int32 on data's device, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32 on data's device, the bounds of each example's tape rows.
        num_input_rows: number of input rows, which is cu_inputs[batch].
        min_inputs: fewest input rows of an example; 0 in an empty batch.
        max_inputs: most input rows of an example.
        max_tapes: a bound on the tape rows of an example.
        exact: True when examples own every row; False in capacity mode, where the rows from
            cu_tapes[batch] on are unused.
        row_multiple: the number of rows is kept a multiple of it: see `round_rows`.

    Source: SPEC 5.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
        >>> batch = ak.ElasticBatch.from_padded(torch.randn(2, 4, 8), mask)
        >>> batch.data.shape, batch.lens.tolist()
        (torch.Size([6, 8]), [4, 2])
    """

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.batch

    def __iter__(self) -> Iterator[ElasticExample]:
        """Yield the examples, as views through which gradients pass."""
        refuse_reentrant_checkpoint(self)
        return examples_of(self.data, self.cu_inputs, self.cu_tapes)

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, index: int) -> ElasticExample: ...

        @overload
        def __getitem__(self, index: slice) -> "ElasticBatch": ...

    def __getitem__(self, index: int | slice) -> "ElasticExample | ElasticBatch":
        """Return one example as views, or a batch of a copy of the examples of a slice."""
        if isinstance(index, slice):
            joined = type(self)._joined(list(self)[index], self.data[:0])
            return joined.round_rows(self.row_multiple) if self.row_multiple > 1 else joined
        number = check_int("index", index, None)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index: expected one of {len(self)} examples, got {number}")
        refuse_reentrant_checkpoint(self)
        return example_at(number % len(self), self.data, self.cu_inputs, self.cu_tapes)

    def to_padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the examples' rows padded with zeros, and the mask of those that are valid.

        Args:
            length: so many rows for each example; None for those of the longest, whose number is
                copied to the host.

        Returns:
            (batch, length, dim), the input rows of each example before its tape rows, and
            (batch, length) bool.

        Raises:
            ValueError: where the offsets lie on the host, an example has more rows than length.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> mask = torch.tensor([[True, False, True], [True, False, False]])
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 8), mask)
            >>> padded, mask = batch.to_padded()
            >>> padded.shape, mask.tolist()
            (torch.Size([2, 2, 8]), [[True, True], [True, False]])
        """
        refuse_reentrant_checkpoint(self)
        lens = self.lens
        if length is None:
            length = int(lens.max()) if self.batch else 0
        elif can_be_seen(lens) and self.batch:
            check_int("length", length, int(lens.max()))
        else:
            length = check_int("length", length)
        mask = torch.arange(length, device=lens.device) < lens.unsqueeze(1)
        # One place more than there are, for the rows that belong to no example.
        places = self.data.new_zeros(self.batch * length + 1, *self.data.shape[1:])
        places = places.index_copy(0, self._padded_places(length), self.data)
        return places[:-1].view(self.batch, length, *self.data.shape[1:]), mask

    def _padded_places(self, length: int) -> Tensor:
        """Return the place of each row in (batch · length), or batch · length if it has none."""
        row = torch.arange(self.data.shape[0], device=self.data.device)
        example = self.example_of_rows()
        first_input, first_tape = self.cu_inputs[example], self.cu_tapes[example]
        input_lens = torch.nn.functional.pad(self.input_lens, (0, 1))
        in_tape = row - first_tape + input_lens[example]
        position = torch.where(row < self.num_input_rows, row - first_input, in_tape)
        exists = (example < self.batch) & (position < length)
        return torch.where(exists, example * length + position, self.batch * length)

    def to_packed(self) -> tuple[Tensor, Tensor]:
        """Return the rows example after example, and their bounds.

        Returns:
            (total, dim), the input rows of each example before its tape rows, and cu_seqlens
            (batch + 1,) int32. Copies the number of rows to the host.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> packed, cu_seqlens = batch.to_packed()
            >>> packed.shape, cu_seqlens.tolist()
            (torch.Size([6, 8]), [0, 3, 6])
        """
        refuse_reentrant_checkpoint(self)
        cu_seqlens = cumulative(self.lens)
        order = packed_order(self.cu_inputs, self.cu_tapes, int(cu_seqlens[-1]))
        return self.data.index_select(0, order), cu_seqlens

    def to_nested(self) -> Tensor:
        """Return the examples as a nested tensor (batch, *, dim) of layout torch.jagged.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> nested = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).to_nested()
            >>> nested.layout, len(nested.unbind())
            (torch.jagged, 2)
        """
        packed, cu_seqlens = self.to_packed()
        return torch.nested.nested_tensor_from_jagged(packed, cu_seqlens.to(torch.int64))

    def append_tape(
        self, tape: Tensor, offsets: Tensor, *, max_tapes: int, exact: bool = True
    ) -> "ElasticBatch":
        """Append tape tokens behind those that each example already has.

        Does not synchronise, and moves no input row.

        Args:
            tape: (tape_rows, dim), packed example after example; unused rows last.
            offsets: (batch + 1,) int32 or int64, where example i appends rows offsets[i] to
                offsets[i + 1].
            max_tapes: a bound on the rows that one example appends.
            exact: False when `tape` may hold unused rows (capacity mode).

        Raises:
            ValueError: a shape, dtype or device differs from the above or, where the offsets lie on
                the host, they do not begin at 0, descend, do not end at the number of tape rows
                (or pass it, in capacity mode), or exceed max_tapes. On a GPU they stay unseen, and
                wrong offsets give wrong rows.
            TypeError: an argument is of another type altogether.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
            >>> offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
            >>> batch.append_tape(torch.ones(3, 8), offsets, max_tapes=2).lens.tolist()
            [5, 4]
        """
        refuse_reentrant_checkpoint(self)
        max_tapes = check_int("max_tapes", max_tapes)
        offsets = checked_tape_offsets(self.data, self.cu_tapes, tape, offsets, max_tapes, exact)
        if self.row_multiple > 1:
            missing = -(self.data.shape[0] + tape.shape[0]) % self.row_multiple
            tape = torch.nn.functional.pad(tape, (0, 0, 0, missing))
        cu_tapes = self.cu_tapes + offsets
        layout = dataclasses.replace(
            self,
            cu_tapes=cu_tapes,
            max_tapes=self.max_tapes + max_tapes,
            exact=self.exact and exact,
        )
        rows = torch.cat([self.data, tape])
        if self.max_tapes == 0 and self.exact:
            return layout.with_data(rows)
        # An old tape row moves back by the number of rows that earlier examples append; a new tape
        # row comes to lie behind the old ones of its example. Unused rows, first the old ones and
        # then the new ones, end up behind all tape rows.
        old = torch.arange(self.num_input_rows, self.data.shape[0], device=tape.device)
        new = torch.arange(tape.shape[0], device=tape.device)
        old_example = torch.searchsorted(self.cu_tapes[1:], old, right=True)
        new_example = torch.searchsorted(offsets[1:], new, right=True)
        old_ends = torch.cat([self.cu_tapes[1:], self.cu_tapes.new_full((1,), self.data.shape[0])])
        inputs = torch.arange(self.num_input_rows, device=tape.device)
        target_row = torch.cat([inputs, old + offsets[old_example], new + old_ends[new_example]])
        if target_row.device.type == "cuda":  # where wrong offsets stay unseen
            target_row = target_row.clamp(0, rows.shape[0] - 1)
        return layout.with_data(torch.empty_like(rows).index_copy(0, target_row, rows))

    def keep(self, mask: Tensor) -> tuple["ElasticBatch", Tensor]:
        """Keep some rows of each example, in their order, and let the others leave.

        Copies the number of rows that are kept, and then the new offsets, to the host: the layers
        ask for the number of input rows there. `ops.compact_rows` with a capacity copies nothing.

        Args:
            mask: (rows,) bool, True where a row of data is kept; ignored for unused rows, which
                leave in any case.

        Returns:
            The batch of the rows that are kept, in which an example may have none; and source
            (rows kept,) int32, the row of data that each of them was. Where `round_rows` was called
            the new batch has unused rows, too, which source does not name.

        Raises:
            ValueError: the mask has another shape, dtype or device.
            TypeError: it is no tensor.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.arange(6.0).view(2, 3, 1))
            >>> kept, source = batch.keep(torch.tensor([True, False, True, False, False, True]))
            >>> kept.lens.tolist(), kept.data.flatten().tolist(), source.tolist()
            ([2, 1], [0.0, 2.0, 5.0], [0, 2, 5])
        """
        refuse_reentrant_checkpoint(self)
        return with_rows_kept(self, mask)

    def keep_examples(self, mask: Tensor) -> tuple["ElasticBatch", Tensor]:
        """Keep some examples, in their order, and let the others leave with all their rows.

        Copies to the host what `keep` does, and the number of examples that are kept.

        Args:
            mask: (batch,) bool, True where an example is kept.

        Returns:
            The batch of the examples that are kept, and source, as `keep` returns it.

        Raises:
            ValueError: the mask has another shape, dtype or device.
            TypeError: it is no tensor.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.arange(6.0).view(2, 3, 1))
            >>> kept, source = batch.keep_examples(torch.tensor([False, True]))
            >>> len(kept), kept.data.flatten().tolist(), source.tolist()
            (1, [3.0, 4.0, 5.0], [3, 4, 5])
        """
        refuse_reentrant_checkpoint(self)
        return with_examples_kept(self, mask)

    def pool(self, kind: Pooling) -> Tensor:
        """Reduce each example's rows, inputs and tape, to one.

        Args:
            kind: "mean", "max" or "sum", which give 0 over no rows, or "token", which takes the
                first input row.

        Returns:
            (batch, dim), dtype of data; summed in float32, or in float64 for float64 data.

        Raises:
            ValueError: `kind` is none of these, or "token" meets an example without input rows.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.arange(6.0).view(2, 3, 1))
            >>> batch.pool("mean").flatten().tolist(), batch.pool("token").flatten().tolist()
            ([1.0, 4.0], [0.0, 3.0])
        """
        refuse_reentrant_checkpoint(self)
        if kind == "token":
            if self.min_inputs == 0 and self.batch > 0:
                raise ValueError("kind: expected an input row in every example for 'token', got 0")
            return self.data.index_select(0, self.cu_inputs[:-1])
        if kind not in ("mean", "max", "sum"):
            raise ValueError(f"kind: expected token, mean, max or sum, got {shown(kind)}")
        example, inputs = self.example_of_rows(), self.num_input_rows
        # An example's tape rows are counted on from its input rows.
        tapes_begin = pad(self.cu_tapes[:-1] - self.input_lens, (0, 1))
        begin = torch.cat([self.cu_inputs[example[:inputs]], tapes_begin[example[inputs:]]])
        place = torch.arange(self.data.shape[0], device=self.data.device) - begin
        return pool_rows(self.data, example, place, self.lens, kind)


torch.export.register_dataclass(ElasticBatch)
