"""What a model returns, the elastic one and the padded one alike."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.tensor_methods import TensorMethods


class HaltedUnits(NamedTuple):
    """When the examples of a batch halted, or the rows of each.

    A slice of an output has the steps and remainders of its examples, and the other fields as they
    are for the whole batch.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=6)
        >>> halted = model(torch.zeros(2, 3, 32, 32)).halted
        >>> halted.steps.tolist(), halted.rows_per_step
        ([4, 4], (10, 10, 10, 10))
    """

    steps: Tensor
    """N, (batch,) int32; or (batch, most rows) where rows halt, 0 where there is no row."""
    remainders: Tensor
    """R, shaped as steps, float32 (float64 for float64), 0 of what never halted; differentiable."""
    means: Tensor | None
    """(layers,) the mean halting probability of each layer, of an A-ViT; differentiable."""
    rows_per_step: tuple[int, ...]
    """Number of rows that each step computed."""


@dataclass
class AdaTapeOutput(TensorMethods):
    """What a model returns for a batch of examples; a pytree node of torch.

    Its length is the number of examples. An index gives one example, whose tensors lack the
    dimension of the batch, and a slice several. It moves and changes its dtype as a tensor does.

    Source: SPEC 6 and 7.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
        >>> output = model(torch.zeros(2, 3, 8, 8))
        >>> output.logits.shape, output.ponder.shape, len(output.reads)
        (torch.Size([2, 5]), torch.Size([2, 1]), 1)
        >>> len(output), output[0].logits.shape, output.detach().double().logits.dtype
        (2, torch.Size([5]), torch.float64)
    """

    logits: Tensor
    """(batch, num_classes), in the parameters' dtype."""
    tape_lens: Tensor
    """(batch,) int32, the number of tape tokens of each example, over all reads."""
    ponder: Tensor
    """(batch, reads), the ponder loss of each read, in the order of the layers; of a model that
    halts (batch, 1), N + R, of which each example has the mean over its rows where rows halt."""
    reads: tuple[TapeSelection, ...]
    """What each read selected, in the order of the layers."""
    halted: HaltedUnits | None = None
    """When examples or rows halted, of a model that halts."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> model(torch.zeros(2, 3, 8, 8)).dtype
            torch.float32
        """
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> model(torch.zeros(2, 3, 8, 8)).device
            device(type='cpu')
        """
        return self.logits.device

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.logits)

    def __iter__(self) -> Iterator["AdaTapeOutput"]:
        """Yield what there is for each example."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: int | slice) -> "AdaTapeOutput":
        """Return what there is for one example, or for those of a slice, as views."""
        at: int | slice = index
        if not isinstance(index, slice):
            at = check_int("index", index, None)
            if not -len(self) <= at < len(self):
                raise IndexError(f"index: expected one of {len(self)} examples, got {at}")
        elif index.step is not None and index.step < 0:
            raise ValueError(f"index: expected a slice of a positive step, got {index.step}")
        own, halted = self, self.halted
        if halted is not None:  # the means of layers have no dimension of the batch
            own = dataclasses.replace(self, halted=halted._replace(means=None))
        taken = own._with_tensors(lambda values: values[at], lambda numbers: numbers[at])
        if halted is not None and taken.halted is not None:
            taken.halted = taken.halted._replace(means=halted.means)
        return taken

    def _with_tensors(
        self, of_values: Callable[[Tensor], Tensor], of_numbers: Callable[[Tensor], Tensor]
    ) -> "AdaTapeOutput":
        def changed(tensor: Tensor) -> Tensor:
            return of_values(tensor) if tensor.is_floating_point() else of_numbers(tensor)

        logits, tape_lens, ponder = map(changed, (self.logits, self.tape_lens, self.ponder))
        reads = tuple(TapeSelection(*map(changed, read)) for read in self.reads)
        halted = self.halted
        if halted is not None:
            means = None if halted.means is None else changed(halted.means)
            steps, remainders = changed(halted.steps), changed(halted.remainders)
            halted = HaltedUnits(steps, remainders, means, halted.rows_per_step)
        old = (self.logits, self.tape_lens, self.ponder, *sum(self.reads, ()))
        new = (logits, tape_lens, ponder, *sum(reads, ()))
        if halted is not None and self.halted is not None:
            old, new = (*old, *self.halted[:3]), (*new, *halted[:3])
        if all(a is b for a, b in zip(old, new, strict=True)):
            return self
        return dataclasses.replace(
            self, logits=logits, tape_lens=tape_lens, ponder=ponder, reads=reads, halted=halted
        )


torch.export.register_dataclass(AdaTapeOutput)


def stack_ponder(reads: tuple[TapeSelection, ...], logits: Tensor) -> Tensor:
    """Return the ponder losses (batch, reads); without a read (batch, 0), in the logits' dtype."""
    if not reads:
        return logits.new_zeros(logits.shape[0], 0)
    return torch.stack([read.ponder for read in reads], 1)
