"""How an `ElasticBatch` is made: of rows that are laid out, padded, packed or nested (SPEC 5)."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_flag, check_tensor
from adatape_kernels.elastic_examples import ElasticExample, checked_examples
from adatape_kernels.elastic_layout import ElasticLayout
from adatape_kernels.layout_checks import check_layout
from adatape_kernels.offsets import (
    INTEGERS,
    as_int32,
    check_offsets,
    check_same_device,
    cumulative,
    packed_order,
)

if TYPE_CHECKING:  # Python has Self from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class ElasticSources(ElasticLayout):
    """The class methods that make an `ElasticBatch`, which extends it."""

    @classmethod
    def from_offsets(
        cls, data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *, exact: bool = True
    ) -> "Self":
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
    ) -> "Self":
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
    ) -> "Self":
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
    def from_nested(cls, nested: Tensor, tape_lens: Tensor | None = None) -> "Self":
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
    ) -> "Self":
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
    def _joined(cls, examples: list[ElasticExample], empty: Tensor | None = None) -> "Self":
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
