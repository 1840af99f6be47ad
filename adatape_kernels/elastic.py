"""ElasticBatch: a batch whose examples own different numbers of rows (SPEC 5).

`ElasticLayout`, which it extends, says where the rows of an example lie; here stands how a batch is
made, taken apart, appended to, shrunk and pooled. It has more than 400 lines because every method
has an example that a doctest runs.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from adatape_kernels.arguments import check_flag, check_int, check_tensor, shown
from adatape_kernels.elastic_examples import (
    ElasticExample,
    checked_examples,
    example_at,
    examples_of,
)
from adatape_kernels.elastic_kept import with_examples_kept, with_rows_kept
from adatape_kernels.elastic_layout import ElasticLayout
from adatape_kernels.layout_checks import check_layout, checked_tape_offsets
from adatape_kernels.offsets import (
    INTEGERS,
    as_int32,
    can_be_seen,
    check_offsets,
    check_same_device,
    cumulative,
    packed_order,
)
from adatape_kernels.pooling import Pooling, pool_rows
from adatape_kernels.reentrant_checkpoint import refuse_reentrant_checkpoint


@dataclass(frozen=True, eq=False, repr=False)
class ElasticBatch(ElasticLayout):
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

    @classmethod
    def from_offsets(
        cls, data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *, exact: bool = True
    ) -> "ElasticBatch":
        """Wrap a buffer that is laid out already, after a check that synchronises.

        Args:
            data: (rows, dim).
            cu_inputs: (batch + 1,) int32 or int64, the bounds of each example's input rows, from 0
                on.
            cu_tapes: (batch + 1,) int32 or int64, the bounds of each example's tape rows, from the
                last input row on.
            exact: False allows unused rows behind the last tape row (capacity mode).

        Raises:
            ValueError: a shape, dtype or device differs from the above, or the offsets descend, do
                not join, or do not end at the number of rows.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> cu_inputs = torch.tensor([0, 2, 3], dtype=torch.int32)
            >>> cu_tapes = torch.tensor([3, 3, 5], dtype=torch.int32)
            >>> batch = ak.ElasticBatch.from_offsets(torch.zeros(5, 8), cu_inputs, cu_tapes)
            >>> batch.input_lens.tolist(), batch.tape_lens.tolist()
            ([2, 1], [0, 2])
        """
        check_layout(data, cu_inputs, cu_tapes)
        check_flag("exact", exact)
        input_lens = cu_inputs.diff().tolist()
        num_input_rows = int(cu_inputs[-1])
        check_offsets("cu_inputs", cu_inputs, 0, min(num_input_rows, len(data)))
        check_offsets("cu_tapes", cu_tapes, num_input_rows, len(data), exact)
        return cls(
            data,
            as_int32("cu_inputs", cu_inputs),
            as_int32("cu_tapes", cu_tapes),
            num_input_rows,
            min(input_lens, default=0),
            max(input_lens, default=0),
            max(cu_tapes.diff().tolist(), default=0),
            exact,
        )

    @classmethod
    def from_padded(
        cls, padded: Tensor, mask: Tensor | None = None, tape_lens: Tensor | None = None
    ) -> "ElasticBatch":
        """Take the valid rows of a padded batch.

        Args:
            padded: (batch, seqlen, dim).
            mask: (batch, seqlen) bool, True where a row is valid, in any pattern; None when all
                are, which neither copies nor synchronises.
            tape_lens: (batch,) int32 or int64; so many of each example's last valid rows are tape.

        Raises:
            ValueError: a shape, dtype or device differs from the above, or an example has fewer
                valid rows than tape_lens says.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 4))
            >>> batch.lens.tolist()
            [3, 3]
        """
        check_tensor("padded", padded)
        if padded.dim() != 3:
            raise ValueError(f"padded: expected (batch, seqlen, dim), got {tuple(padded.shape)}")
        batch, seqlen, dim = padded.shape
        if mask is None and tape_lens is None:
            numbers = torch.arange(batch + 1, device=padded.device, dtype=torch.int32)
            cu_inputs = numbers * seqlen
            rows = batch * seqlen
            data = padded.reshape(rows, dim)
            # No example has tape rows, so that all of their bounds are the end of the input rows.
            return cls(data, cu_inputs, torch.full_like(numbers, rows), rows, seqlen, seqlen)
        if mask is None:
            mask = torch.ones(batch, seqlen, dtype=torch.bool, device=padded.device)
        check_tensor("mask", mask)
        if mask.shape != (batch, seqlen) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool ({batch}, {seqlen}) like padded, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        check_same_device("mask", mask, padded)
        return cls.from_packed(padded[mask], cumulative(mask.sum(1)), tape_lens)

    @classmethod
    def from_packed(
        cls, packed: Tensor, cu_seqlens: Tensor, tape_lens: Tensor | None = None
    ) -> "ElasticBatch":
        """Take a batch packed example after example.

        Args:
            packed: (rows, dim).
            cu_seqlens: (batch + 1,) int32 or int64, where example i owns rows cu_seqlens[i] to
                cu_seqlens[i + 1].
            tape_lens: (batch,) int32 or int64; so many of each example's last rows are tape.

        Raises:
            ValueError: a shape, dtype or device differs, the offsets do not ascend or do not end
                at the number of rows, or an example has fewer rows than tape_lens says.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
            >>> batch = ak.ElasticBatch.from_packed(
            ...     torch.zeros(6, 8), cu_seqlens, tape_lens=torch.tensor([0, 3])
            ... )
            >>> batch.input_lens.tolist(), batch.tape_lens.tolist()
            ([2, 1], [0, 3])
        """
        check_layout(packed, cu_seqlens, cu_seqlens, "packed", "cu_seqlens")
        check_offsets("cu_seqlens", cu_seqlens, 0, len(packed))
        if tape_lens is None:
            return cls.from_offsets(packed, cu_seqlens, torch.full_like(cu_seqlens, len(packed)))
        lens = as_int32("cu_seqlens", cu_seqlens).diff()
        check_tensor("tape_lens", tape_lens)
        if tape_lens.shape != lens.shape or tape_lens.dtype not in INTEGERS:
            raise ValueError(
                f"tape_lens: expected int32 or int64 ({len(lens)},), "
                f"got {tape_lens.dtype} {tuple(tape_lens.shape)}"
            )
        check_same_device("tape_lens", tape_lens, packed)
        wrong = ((tape_lens < 0) | (tape_lens > lens)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"tape_lens: expected 0 to {int(lens[i])} (the rows of example {i}), "
                f"got {int(tape_lens[i])}"
            )
        cu_inputs = cumulative(lens - tape_lens)
        cu_tapes = cumulative(tape_lens, start=int(cu_inputs[-1]))
        order = packed_order(cu_inputs, cu_tapes, len(packed))
        data = torch.empty_like(packed).index_copy(0, order, packed)
        return cls.from_offsets(data, cu_inputs, cu_tapes)

    @classmethod
    def from_nested(cls, nested: Tensor, tape_lens: Tensor | None = None) -> "ElasticBatch":
        """Take a nested tensor.

        Args:
            nested: (batch, *, dim), contiguous and of layout torch.jagged.
            tape_lens: (batch,) int32 or int64; so many of each example's last rows are tape.

        Raises:
            ValueError: the tensor is not a contiguous jagged one, or as in `from_packed`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> parts = [torch.zeros(2, 8), torch.zeros(5, 8)]
            >>> nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
            >>> ak.ElasticBatch.from_nested(nested).lens.tolist()
            [2, 5]
        """
        check_tensor("nested", nested)
        jagged: Any = nested
        shape = tuple(nested.shape) if nested.is_nested and nested.layout == torch.jagged else ()
        # A transposed nested tensor has its ragged dimension last.
        if len(shape) != 3 or not isinstance(shape[2], int) or jagged.lengths() is not None:
            raise ValueError(
                "nested: expected a contiguous nested tensor (batch, *, dim) of layout "
                f"torch.jagged, got {nested.layout} {shape or ''}".rstrip()
            )
        return cls.from_packed(nested.values(), jagged.offsets(), tape_lens)

    @classmethod
    def from_examples(
        cls, examples: Iterable[Tensor | tuple[Tensor, Tensor] | ElasticExample]
    ) -> "ElasticBatch":
        """Put examples into one batch, which copies them; a DataLoader takes it as collate_fn.

        Args:
            examples: at least one, each of them input rows (rows, dim), or a pair of input rows and
                tape rows, as iteration over a batch gives them.

        Raises:
            ValueError: there is none, or a shape, dtype or device differs from the first one's.
            TypeError: one is of another type altogether.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_examples([torch.zeros(2, 8), torch.zeros(5, 8)])
            >>> batch.lens.tolist(), ak.ElasticBatch.from_examples(reversed(batch)).lens.tolist()
            ([2, 5], [5, 2])
        """
        return cls._joined(checked_examples(examples))

    @classmethod
    def _joined(cls, examples: list[ElasticExample], empty: Tensor | None = None) -> "ElasticBatch":
        """Return a batch of examples that match; `empty` (0, dim) matches where there are none."""
        inputs, tapes = [each.inputs for each in examples], [each.tape for each in examples]
        data = torch.cat([*inputs, *tapes] if empty is None else [empty, *inputs, *tapes])
        input_lens, tape_lens = [len(rows) for rows in inputs], [len(rows) for rows in tapes]
        rows = sum(input_lens)
        offsets = torch.tensor(
            [list(accumulate(input_lens, initial=0)), list(accumulate(tape_lens, initial=rows))],
            dtype=torch.int32,
            device=data.device,
        )
        return cls(
            data,
            offsets[0],
            offsets[1],
            rows,
            min(input_lens, default=0),
            max(input_lens, default=0),
            max(tape_lens, default=0),
        )

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
        return pool_rows(self.data, self.example_of_rows(), self.lens, kind)


torch.export.register_dataclass(ElasticBatch)
