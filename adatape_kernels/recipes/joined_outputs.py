"""What a model returned for the batches of a set, as if these were one batch."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from adatape_kernels.models import AdaTapeOutput, HaltedUnits
from adatape_kernels.op_types import TapeSelection


def joined(outputs: Sequence[AdaTapeOutput]) -> AdaTapeOutput:
    """Return the outputs of a model for one batch after the other as one output.

    The mean halting probabilities of layers are left out, as those of batches are no means of the
    set.

    Args:
        outputs: one or more, of examples with equally many rows where rows halt.
    """
    return AdaTapeOutput(
        torch.cat([output.logits for output in outputs]),
        torch.cat([output.tape_lens for output in outputs]),
        torch.cat([output.ponder for output in outputs]),
        tuple(
            TapeSelection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
            for selections in zip(*(output.reads for output in outputs), strict=True)
        ),
        _halted([output.halted for output in outputs if output.halted is not None]),
    )


def _halted(units: Sequence[HaltedUnits]) -> HaltedUnits | None:
    if not units:
        return None
    rows = zip_longest(*(unit.rows_per_step for unit in units), fillvalue=0)
    return HaltedUnits(
        torch.cat([unit.steps for unit in units]),
        torch.cat([unit.remainders for unit in units]),
        None,
        tuple(map(sum, rows)),
    )
