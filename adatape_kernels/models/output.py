"""What a model returns, the elastic one and the padded one alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adatape_kernels.op_types import TapeSelection


@dataclass
class AdaTapeOutput:
    """What a model returns for a batch of examples; a pytree node of torch.

    Source: SPEC 6 and 7.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
        >>> output = model(torch.zeros(2, 3, 8, 8))
        >>> output.logits.shape, output.ponder.shape, len(output.reads)
        (torch.Size([2, 5]), torch.Size([2, 1]), 1)
    """

    logits: Tensor
    """(batch, num_classes), in the parameters' dtype."""
    tape_lens: Tensor
    """(batch,) int32, the number of tape tokens of each example, over all reads."""
    ponder: Tensor
    """(batch, reads), the ponder loss of each read, in the order of the layers."""
    reads: tuple[TapeSelection, ...]
    """What each read selected, in the order of the layers."""


torch.export.register_dataclass(AdaTapeOutput)


def stack_ponder(reads: tuple[TapeSelection, ...], logits: Tensor) -> Tensor:
    """Return the ponder losses (batch, reads); without a read (batch, 0), in the logits' dtype."""
    if not reads:
        return logits.new_zeros(logits.shape[0], 0)
    return torch.stack([read.ponder for read in reads], 1)
