"""ElasticBatch: a batch whose examples own different numbers of rows (SPEC section 5).

rows: | inputs of 0 | … | inputs of B-1 | tape of 0 | … | tape of B-1 | unused (capacity mode) |
      cu_inputs[0] = 0                   cu_tapes[0] = cu_inputs[B]
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["token", "mean", "max", "sum"]


def cumulative(lens: Tensor, start: int = 0) -> Tensor:
    """Return the int32 offsets (batch + 1,) of segments of these lengths (batch,), from `start`."""
    return F.pad(lens.cumsum(0), (1, 0)).add(start).to(torch.int32)


def check_offsets(name: str, offsets: Tensor, start: int, end: int, exact: bool = True) -> None:
    """Check the values of int32 offsets: from `start`, never descending, to `end` (or before it).

    Copies the offsets to the host. Raises ValueError.
    """
    values = offsets.tolist()
    if values[0] != start:
        raise ValueError(f"{name}: expected the first offset to be {start}, got {values[0]}")
    for i, (low, high) in enumerate(itertools.pairwise(values)):
        if high < low:
            raise ValueError(
                f"{name}: expected ascending offsets, got {low} then {high} at {i}, {i + 1}"
            )
    if values[-1] != end if exact else values[-1] > end:
        bound = "" if exact else "at most "
        raise ValueError(
            f"{name}: expected the last offset to be {bound}{end} (the number of rows), "
            f"got {values[-1]}"
        )


def check_examples(
    cu_inputs: Tensor, cu_tapes: Tensor, num_rows: int, max_rows: int | None
) -> None:
    """Check the values of a layout's offsets, and that no example has more than `max_rows`.

    Rows behind the last offset may be unused. Copies to the host. Raises ValueError.
    """
    check_offsets("cu_inputs", cu_inputs, 0, num_rows, exact=False)
    check_offsets("cu_tapes", cu_tapes, int(cu_inputs[-1]), num_rows, exact=False)
    longest = max((cu_inputs.diff() + cu_tapes.diff()).tolist(), default=0)
    if max_rows is not None and longest > max_rows:
        raise ValueError(f"max_rows: expected at least {longest} (the longest), got {max_rows}")


def packed_order(cu_inputs: Tensor, cu_tapes: Tensor, total: int) -> Tensor:
    """Return the physical row of every row in example-after-example order, (total,) int64.

    `total` is the number of rows that examples own; it is the caller's, so nothing synchronises.
    """
    input_lens = cu_inputs.diff()
    lens = input_lens + cu_tapes.diff()
    example = torch.repeat_interleave(lens, output_size=total)
    row = torch.arange(total, device=lens.device) - cumulative(lens)[example]
    in_tape = row - input_lens[example]
    return torch.where(in_tape < 0, cu_inputs[example] + row, cu_tapes[example] + in_tape)


@dataclass(frozen=True, eq=False)
class ElasticBatch:
    """A batch of token sequences of any lengths, each with input rows and tape rows.

    Make one with `from_padded`, `from_packed`, `from_nested` or `from_offsets`; the constructor
    trusts its arguments.

    Attributes:
        data: (rows, dim), laid out as above.
        cu_inputs: (batch + 1,) int32 on data's device, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32, the bounds of each example's tape rows.
        num_input_rows: rows of the input segment.
        min_inputs: fewest input rows of an example (0 in an empty batch).
        max_inputs: most input rows of an example.
        max_tapes: a bound on the tape rows of an example.
        exact: True when examples own every row; False in capacity mode, where rows behind
            `cu_tapes[batch]` are unused.

    Source: SPEC 5.
    """

    data: Tensor
    cu_inputs: Tensor
    cu_tapes: Tensor
    num_input_rows: int
    min_inputs: int
    max_inputs: int
    max_tapes: int = 0
    exact: bool = True

    # Making one

    @classmethod
    def from_offsets(
        cls, data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *, exact: bool = True
    ) -> "ElasticBatch":
        """Check a buffer (rows, dim) with its offsets (batch + 1,) int32, and wrap it.

        Synchronises. `exact=False` allows unused rows behind the last offset (capacity mode).

        Raises:
            ValueError: a shape, dtype or device differs, or the offsets do not ascend, do not
                join, or do not end at the number of rows.
        """
        _check_layout(data, cu_inputs, cu_tapes)
        input_lens = cu_inputs.diff().tolist()
        num_input_rows = int(cu_inputs[-1])
        check_offsets("cu_inputs", cu_inputs, 0, min(num_input_rows, len(data)))
        check_offsets("cu_tapes", cu_tapes, num_input_rows, len(data), exact)
        return cls(
            data,
            cu_inputs,
            cu_tapes,
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
            ValueError: a shape, dtype or device differs from the above.
        """
        if padded.dim() != 3:
            raise ValueError(f"padded: expected (batch, seqlen, dim), got {tuple(padded.shape)}")
        batch, seqlen, dim = padded.shape
        if mask is None and tape_lens is None:
            steps = torch.arange(batch + 1, device=padded.device, dtype=torch.int32)
            cu_inputs = steps * seqlen
            rows = batch * seqlen
            data = padded.reshape(rows, dim)
            # A capacity of tape starts where the inputs end, for every example.
            return cls(data, cu_inputs, torch.full_like(steps, rows), rows, seqlen, seqlen)
        if mask is None:
            mask = torch.ones(batch, seqlen, dtype=torch.bool, device=padded.device)
        if mask.shape != (batch, seqlen) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool ({batch}, {seqlen}) like padded, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        _check_device("mask", mask, padded)
        return cls.from_packed(padded[mask], cumulative(mask.sum(1)), tape_lens)

    @classmethod
    def from_packed(
        cls, packed: Tensor, cu_seqlens: Tensor, tape_lens: Tensor | None = None
    ) -> "ElasticBatch":
        """Take a batch packed example after example.

        Args:
            packed: (rows, dim).
            cu_seqlens: (batch + 1,) int32, where example i owns rows cu_seqlens[i] to
                cu_seqlens[i + 1].
            tape_lens: (batch,) int32 or int64; so many of each example's last rows are tape.

        Raises:
            ValueError: a shape, dtype or device differs, the offsets do not ascend or do not end
                at the number of rows, or an example has fewer rows than tape_lens says.
        """
        _check_layout(packed, cu_seqlens, cu_seqlens, "packed", "cu_seqlens")
        check_offsets("cu_seqlens", cu_seqlens, 0, len(packed))
        if tape_lens is None:
            return cls.from_offsets(packed, cu_seqlens, torch.full_like(cu_seqlens, len(packed)))
        lens = cu_seqlens.diff()
        if tape_lens.shape != lens.shape or tape_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tape_lens: expected int32 or int64 ({len(lens)},), "
                f"got {tape_lens.dtype} {tuple(tape_lens.shape)}"
            )
        _check_device("tape_lens", tape_lens, packed)
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
        """Take a jagged nested tensor (batch, *, dim); `tape_lens` as in `from_packed`.

        Raises:
            ValueError: the tensor is not a contiguous jagged one, or as in `from_packed`.
        """
        jagged: Any = nested
        shape = tuple(nested.shape) if nested.is_nested and nested.layout == torch.jagged else ()
        # A transposed one has its ragged dimension last.
        if len(shape) != 3 or not isinstance(shape[2], int) or jagged.lengths() is not None:
            raise ValueError(
                "nested: expected a contiguous nested tensor (batch, *, dim) of layout "
                f"torch.jagged, got {nested.layout} {shape or ''}".rstrip()
            )
        return cls.from_packed(nested.values(), jagged.offsets().to(torch.int32), tape_lens)

    # Taking it apart

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """Return (batch, longest, dim), zero where padded, and the bool mask (batch, longest)."""
        packed, cu_seqlens = self.to_packed()
        lens = cu_seqlens.diff()
        longest = int(lens.max()) if self.batch else 0
        mask = torch.arange(longest, device=lens.device) < lens.unsqueeze(1)
        padded = packed.new_zeros(self.batch, longest, *packed.shape[1:])
        return padded.index_put((mask,), packed), mask

    def to_packed(self) -> tuple[Tensor, Tensor]:
        """Return the rows (total, dim) example after example, and cu_seqlens (batch + 1,) int32."""
        cu_seqlens = cumulative(self.lens)
        order = packed_order(self.cu_inputs, self.cu_tapes, int(cu_seqlens[-1]))
        return self.data.index_select(0, order), cu_seqlens

    def to_nested(self) -> Tensor:
        """Return a jagged nested tensor (batch, *, dim)."""
        packed, cu_seqlens = self.to_packed()
        return torch.nested.nested_tensor_from_jagged(packed, cu_seqlens.to(torch.int64))

    # Looking at it

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.cu_inputs.shape[0] - 1

    @property
    def input_lens(self) -> Tensor:
        """Input rows of each example, (batch,) int32."""
        return self.cu_inputs.diff()

    @property
    def tape_lens(self) -> Tensor:
        """Tape rows of each example, (batch,) int32."""
        return self.cu_tapes.diff()

    @property
    def lens(self) -> Tensor:
        """Rows of each example, (batch,) int32."""
        return self.input_lens + self.tape_lens

    @property
    def max_rows(self) -> int:
        """A bound on the rows of an example."""
        return self.max_inputs + self.max_tapes

    @property
    def num_used_rows(self) -> Tensor | None:
        """Rows that examples own, an int32 scalar on the device; None when that is all of them."""
        return None if self.exact else self.cu_tapes[-1]

    def example_of_rows(self) -> Tensor:
        """Return the example that owns each row, (rows,) int64; `batch` for an unused row."""
        row = torch.arange(self.data.shape[0], device=self.data.device)
        of_inputs, of_tapes = row[: self.num_input_rows], row[self.num_input_rows :]
        # The owner of a row is the number of examples that end at or before it.
        return torch.cat(
            [
                torch.searchsorted(self.cu_inputs[1:], of_inputs, right=True),
                torch.searchsorted(self.cu_tapes[1:], of_tapes, right=True),
            ]
        )

    # Changing it

    def with_data(self, data: Tensor) -> "ElasticBatch":
        """Return the same layout over another buffer (rows, any width)."""
        return dataclasses.replace(self, data=data)

    def clear_unused(self, data: Tensor) -> Tensor:
        """Return rows `data` of this layout with zeros in the unused ones (capacity mode)."""
        if self.exact:
            return data
        row = torch.arange(data.shape[0], device=data.device)
        return data.where((row < self.cu_tapes[-1]).unsqueeze(1), 0)

    def append_tape(
        self, tape: Tensor, offsets: Tensor, *, max_tapes: int, exact: bool = True
    ) -> "ElasticBatch":
        """Append tape tokens behind those that each example already has.

        Args:
            tape: (tape_rows, dim), packed example after example; unused rows last.
            offsets: (batch + 1,) int32, where example i appends rows offsets[i] to offsets[i + 1].
            max_tapes: a bound on the rows that one example appends.
            exact: False when `tape` may hold unused rows (capacity mode).

        Does not synchronise, and moves no input row.
        """
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
        # An old tape row moves back by what earlier examples append; a new one stands behind the
        # old ones of its example. Unused rows, old then new, move behind both.
        old = torch.arange(self.num_input_rows, self.data.shape[0], device=tape.device)
        new = torch.arange(tape.shape[0], device=tape.device)
        old_example = torch.searchsorted(self.cu_tapes[1:], old, right=True)
        new_example = torch.searchsorted(offsets[1:], new, right=True)
        old_ends = torch.cat([self.cu_tapes[1:], self.cu_tapes.new_full((1,), self.data.shape[0])])
        inputs = torch.arange(self.num_input_rows, device=tape.device)
        place = torch.cat([inputs, old + offsets[old_example], new + old_ends[new_example]])
        return layout.with_data(torch.empty_like(rows).index_copy(0, place, rows))

    def pool(self, kind: Pooling) -> Tensor:
        """Reduce each example's rows, inputs and tape, to (batch, dim).

        "mean", "max" and "sum" give 0 over no rows; "token" is the first input row.

        Raises:
            ValueError: `kind` is none of these, or "token" meets an example without input rows.
        """
        if kind == "token":
            if self.min_inputs == 0 and self.batch > 0:
                raise ValueError("kind: expected an input row in every example for 'token', got 0")
            return self.data.index_select(0, self.cu_inputs[:-1])
        if kind not in ("mean", "max", "sum"):
            raise ValueError(f"kind: expected token, mean, max or sum, got {kind!r}")
        example = self.example_of_rows()
        lens = self.lens.unsqueeze(1)
        if kind == "max":
            low = self.data.new_full((self.batch + 1, self.data.shape[1]), -torch.inf)
            # An unused row that holds NaN would give itself a NaN gradient: 0 / 0 ties.
            rows = self.data.where((example < self.batch).unsqueeze(1), 0)
            index = example.unsqueeze(1).expand_as(rows)
            return low.scatter_reduce(0, index, rows, "amax")[:-1].where(lens > 0, 0)
        wide = torch.promote_types(self.data.dtype, torch.float32)
        total = torch.zeros(
            self.batch + 1, self.data.shape[1], dtype=wide, device=self.data.device
        ).index_add(0, example, self.data.to(wide))[:-1]
        if kind == "mean":
            total = total / lens.clamp(min=1)
        return total.to(self.data.dtype)


def _check_layout(
    data: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    data_name: str = "data",
    offsets_name: str | None = None,
) -> None:
    if data.dim() != 2:
        raise ValueError(f"{data_name}: expected (rows, dim), got {tuple(data.shape)}")
    for name, offsets in (("cu_inputs", cu_inputs), ("cu_tapes", cu_tapes)):
        check_offsets_tensor(offsets_name or name, offsets, data)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )


def check_offsets_tensor(name: str, offsets: Tensor, data: Tensor) -> None:
    """Check that offsets are int32 (batch + 1,) on the device of `data`. Raises ValueError."""
    shape = offsets.shape
    if offsets.dtype != torch.int32 or len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{name}: expected int32 (batch + 1,), got {offsets.dtype} {tuple(shape)}")
    _check_device(name, offsets, data)


def _check_device(name: str, tensor: Tensor, data: Tensor) -> None:
    if tensor.device != data.device:
        raise ValueError(f"{name}: expected a tensor on {data.device}, got {tensor.device}")
