"""ElasticBatch: a batch whose examples own different numbers of rows (SPEC 5).

rows: | inputs of 0 | … | inputs of B-1 | tape of 0 | … | tape of B-1 | unused (capacity mode) |
      cu_inputs[0] = 0                   cu_tapes[0] = cu_inputs[B]

It has more than 400 lines because every method has an example that a doctest runs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_flag, check_int, check_tensor, shown
from adatape_kernels.layout_checks import check_layout, checked_tape_offsets
from adatape_kernels.offsets import (
    INTEGERS,
    as_int32,
    check_offsets,
    check_same_device,
    cumulative,
    packed_order,
)
from adatape_kernels.pooling import Pooling, pool_rows
from adatape_kernels.reentrant_checkpoint import refuse_reentrant_checkpoint


@dataclass(frozen=True, eq=False)
class ElasticBatch:
    """A batch of token sequences of any lengths, each with input rows and tape rows.

    Make one with `from_padded`, `from_packed`, `from_nested` or `from_offsets`; the constructor
    trusts its arguments. The input rows of all examples come first, example after example, then
    the tape rows of all examples. In capacity mode unused rows follow, which belong to no example.

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

    data: Tensor
    cu_inputs: Tensor
    cu_tapes: Tensor
    num_input_rows: int
    min_inputs: int
    max_inputs: int
    max_tapes: int = 0
    exact: bool = True
    row_multiple: int = 1

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

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """Return the examples' rows padded with zeros, and the mask of those that are valid.

        Returns:
            (batch, longest, dim), the input rows of each example before its tape rows, and
            (batch, longest) bool. Copies the length of the longest example to the host.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> mask = torch.tensor([[True, False, True], [True, False, False]])
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 8), mask)
            >>> padded, mask = batch.to_padded()
            >>> padded.shape, mask.tolist()
            (torch.Size([2, 2, 8]), [[True, True], [True, False]])
        """
        packed, cu_seqlens = self.to_packed()
        lens = as_int32("cu_seqlens", cu_seqlens).diff()
        longest = int(lens.max()) if self.batch else 0
        mask = torch.arange(longest, device=lens.device) < lens.unsqueeze(1)
        padded = packed.new_zeros(self.batch, longest, *packed.shape[1:])
        return padded.index_put((mask,), packed), mask

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

    @property
    def batch(self) -> int:
        """Number of examples.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.batch
            2
        """
        return self.cu_inputs.shape[0] - 1

    @property
    def input_lens(self) -> Tensor:
        """Number of input rows of each example, (batch,) int32.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.input_lens.tolist()
            [3, 1]
        """
        return self.cu_inputs.diff()

    @property
    def tape_lens(self) -> Tensor:
        """Number of tape rows of each example, (batch,) int32.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.tape_lens.tolist()
            [0, 2]
        """
        return self.cu_tapes.diff()

    @property
    def lens(self) -> Tensor:
        """Number of rows of each example, input and tape, (batch,) int32.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.lens.tolist()
            [3, 3]
        """
        return self.input_lens + self.tape_lens

    @property
    def max_rows(self) -> int:
        """A bound on the number of rows of an example, known without synchronising.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.max_rows
            5
        """
        return self.max_inputs + self.max_tapes

    @property
    def num_used_rows(self) -> Tensor | None:
        """Number of rows that examples own, an int32 scalar on the device; None when they own all.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.zeros(1, 3, 8))
            >>> batch.num_used_rows is None
            True
            >>> offsets = torch.tensor([0, 2], dtype=torch.int32)
            >>> tape = torch.zeros(5, 8)
            >>> batch.append_tape(tape, offsets, max_tapes=2, exact=False).num_used_rows
            tensor(5, dtype=torch.int32)
        """
        return None if self.exact else self.cu_tapes[-1]

    def example_of_rows(self) -> Tensor:
        """Return the number of the example that owns each row, (rows,) int64.

        An unused row gets the number of examples, one more than the last example's.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(
            ...     torch.zeros(2, 3, 8), tape_lens=torch.tensor([0, 2])
            ... )
            >>> batch.example_of_rows().tolist()
            [0, 0, 0, 1, 1, 1]
        """
        row = torch.arange(self.data.shape[0], device=self.data.device)
        of_inputs, of_tapes = row[: self.num_input_rows], row[self.num_input_rows :]
        # The owner of a row is the number of examples that end at or before it.
        return torch.cat(
            [
                torch.searchsorted(self.cu_inputs[1:], of_inputs, right=True),
                torch.searchsorted(self.cu_tapes[1:], of_tapes, right=True),
            ]
        )

    def with_data(self, data: Tensor) -> "ElasticBatch":
        """Return the same layout over another buffer.

        Args:
            data: (rows, any width), of any dtype.

        Raises:
            TypeError: the buffer is no tensor.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 8))
            >>> batch.with_data(batch.data[:, :4]).data.shape
            torch.Size([6, 4])
        """
        check_tensor("data", data)
        refuse_reentrant_checkpoint(self)
        return dataclasses.replace(self, data=data)

    def clear_unused(self, data: Tensor) -> Tensor:
        """Return a buffer of this layout with zeros in the unused rows, which capacity mode has.

        Args:
            data: (rows, any width).

        Raises:
            TypeError: the buffer is no tensor.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(1, 2, 1))
            >>> offsets = torch.tensor([0, 1], dtype=torch.int32)
            >>> batch = batch.append_tape(torch.ones(3, 1), offsets, max_tapes=1, exact=False)
            >>> batch.clear_unused(batch.data).flatten().tolist()
            [1.0, 1.0, 1.0, 0.0, 0.0]
        """
        check_tensor("data", data)
        if self.exact:
            return data
        row = torch.arange(data.shape[0], device=data.device)
        return data.where((row < self.cu_tapes[-1]).unsqueeze(1), 0)

    def round_rows(self, multiple: int) -> "ElasticBatch":
        """Return the batch with unused rows behind, so that their number is a multiple of this one.

        What appends rows to the result rounds them up again. Results for the examples' rows are the
        same. On a CPU it saves memory where batches of ever other lengths meet bfloat16: torch
        keeps code for every number of rows that a product has had.

        Args:
            multiple: 1 or more.

        Raises:
            ValueError: the multiple is below 1.
            TypeError: it is no whole number.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 5, 8)).round_rows(64)
            >>> batch.data.shape, batch.lens.tolist()
            (torch.Size([64, 8]), [5, 5])
        """
        multiple = check_int("multiple", multiple, 1)
        refuse_reentrant_checkpoint(self)
        data = torch.nn.functional.pad(self.data, (0, 0, 0, -self.data.shape[0] % multiple))
        return dataclasses.replace(self, data=data, exact=False, row_multiple=multiple)

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
