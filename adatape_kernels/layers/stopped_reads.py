"""Reads that stop at a threshold in a tensor, which nothing waits for (SPEC 3).

The ops take a threshold as a number, which a CUDA graph holds for good. What an example reads in a
step depends on the threshold only through whether the step is taken, so that a read without a
threshold, cut where the halting score reaches one, is the read that stops there.
"""

import torch
from torch import Tensor

from adatape_kernels.op_types import LossType, TapeSelection


def check_threshold(threshold: Tensor) -> None:
    """Raise ValueError unless a tensor is a floating-point scalar."""
    if threshold.dim() or not threshold.is_floating_point():
        raise ValueError(
            "halt_threshold: expected a number or a floating-point scalar tensor, "
            f"got {threshold.dtype} {tuple(threshold.shape)}"
        )


def stopped_at(selection: TapeSelection, threshold: Tensor, loss_type: LossType) -> TapeSelection:
    """Return the steps of a selection that are taken while the halting score is below a threshold.

    Args:
        selection: what `ops.tape_select` returns for the threshold infinity.
        threshold: a scalar on the selection's device.
        loss_type: as in `ops.tape_select`.

    Returns:
        The selection that `ops.tape_select` returns for the threshold, differentiable in the
        weights, of which the ponder loss is computed anew.
    """
    indices, weights, counts, _ = selection
    if not weights.shape[1]:
        return selection
    best = weights.detach()[..., 0]
    # In the order in which the ops add, and not by cumsum, which has no deterministic form on GPUs.
    scores = [torch.zeros_like(best[:, 0])]
    for weight in best[:, :-1].unbind(1):
        scores.append(scores[-1] + weight)
    taken = (torch.stack(scores, 1) < threshold).sum(1)
    counts = torch.minimum(counts, taken.to(counts.dtype))
    used = torch.arange(weights.shape[1], device=counts.device) < counts.unsqueeze(1)
    indices = indices.where(used.unsqueeze(2), -1)
    weights = weights.where(used.unsqueeze(2), 0)
    merged = weights.square().sum(2) if loss_type == "entropy" else weights[..., 0]
    return TapeSelection(indices, weights, counts, (1 - merged).where(used, 0).sum(1))
