"""Which rows of one buffer belong to which example of a batch, and as what (SPEC 5).

rows: | inputs of 0 | … | inputs of B-1 | tape of 0 | … | tape of B-1 | unused (capacity mode) |
      cu_inputs[0] = 0                   cu_tapes[0] = cu_inputs[B]
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adatape_kernels.arguments import check_flag, check_int, check_tensor
from adatape_kernels.reentrant_checkpoint import refuse_reentrant_checkpoint
from adatape_kernels.tensor_methods import TensorMethods

if TYPE_CHECKING:  # Python has Self from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class ElasticLayout(TensorMethods):
    """The attributes of an `ElasticBatch`, what they say of its rows, and other rows laid out so.

    Its attributes are described there.
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

    def __repr__(self) -> str:
        """Describe the batch in one line, without a look at values."""
        name = type(self).__name__
        if not isinstance(self.data, Tensor) or not isinstance(self.cu_inputs, Tensor):
            return f"{name}(data={self.data!r}, …)"  # as a tree of something else than tensors
        tapes = self.data.shape[0] - self.num_input_rows
        return (
            f"{name}(examples={self.batch}, input_rows={self.num_input_rows}, "
            f"tape_rows{'=' if self.exact else '<='}{tapes}, dim={self.data.shape[1:].numel()}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of data.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).dtype
            torch.float32
        """
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """The device of data and of the offsets.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8)).device
            device(type='cpu')
        """
        return self.data.device

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

    def with_data(self, data: Tensor) -> "Self":
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

    def round_rows(self, multiple: int) -> "Self":
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

    def requires_grad_(self, requires_grad: bool = True) -> "Self":
        """Make data a leaf that asks for a gradient, in place; return the batch.

        Args:
            requires_grad: False ends that.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 8)).requires_grad_()
            >>> batch.pool("sum").sum().backward()
            >>> batch.data.grad.sum().item()
            48.0
        """
        check_flag("requires_grad", requires_grad)
        self.data.requires_grad_(requires_grad)
        return self

    def _with_tensors(
        self, of_values: Callable[[Tensor], Tensor], of_numbers: Callable[[Tensor], Tensor]
    ) -> "Self":
        refuse_reentrant_checkpoint(self)
        data = of_values(self.data)
        cu_inputs, cu_tapes = of_numbers(self.cu_inputs), of_numbers(self.cu_tapes)
        if data is self.data and cu_inputs is self.cu_inputs and cu_tapes is self.cu_tapes:
            return self
        return dataclasses.replace(self, data=data, cu_inputs=cu_inputs, cu_tapes=cu_tapes)
