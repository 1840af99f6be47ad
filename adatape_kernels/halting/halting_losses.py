"""What a loop of halting steps is charged (SPEC 11 and 12)."""

import math

import torch
from torch import Tensor

from adatape_kernels.arguments import check_kind, check_number, check_tensor
from adatape_kernels.halting.state import HaltingState
from adatape_kernels.op_types import wide_dtype

_SHARE_BEFORE_CENTER = 0.98
_LEAST_SHARE = 0.01


def ponder_loss(state: HaltingState) -> Tensor:
    """Return the mean of N + R over all units that the loop began with, a scalar.

    A gradient passes through the remainders R alone. Without units it is 0.

    Args:
        state: what the last step returned.

    Raises:
        TypeError: it is no HaltingState.

    Source: SPEC 11 and 12.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> rule = ak.halting.Halting.act()
        >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(1, 3, 4)))
        >>> for p in (0.25, 1.0):
        ...     state = rule.step(state, torch.tensor([p]), state.batch.data)
        >>> ak.halting.ponder_loss(state).item()  # two steps, and 0.75 was left for the second
        2.75
    """
    check_kind("state", state, HaltingState)
    cost = state.updates + state.remainders
    if not state.of_rows or state.initial.exact:
        return cost.sum() / max(1, cost.shape[0])
    # Unused rows never ran, so that they add nothing to the sum.
    return cost.sum() / state.initial.cu_tapes[-1].clamp(min=1)


def distribution_loss(means: Tensor, center: float) -> Tensor:
    """Return how far halting is from a normal distribution over the layers, a scalar.

    t_l = z · φ(l − center) with t_1 + … + t_(center − 1) = 0.98, q = clamp(d / Σ d, 0.01, 0.99);
    the loss is max(0, mean over l of t_l · (ln t_l − ln q_l)).

    Args:
        means: d, (layers,), the mean halting probability of each layer, of any floating dtype.
        center: the layer around which rows should halt, counted from 1, above 1 and up to the
            number of layers; 9 of 12 in A-ViT.

    Raises:
        ValueError: means have another shape or dtype, or the center lies outside.
        TypeError: an argument is of another type altogether.

    Source: SPEC 12; Yin et al., arXiv:2112.07658.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> early, late = torch.tensor([0.9, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9, 0.1])
        >>> loss = ak.halting.distribution_loss
        >>> bool(loss(late, center=3) < loss(early, center=3))
        True
    """
    check_tensor("means", means)
    if means.dim() != 1 or not means.is_floating_point():
        raise ValueError(
            f"means: expected floating-point (layers,), got {means.dtype} {tuple(means.shape)}"
        )
    check_number("center", center, 1, max(1, means.shape[0]))
    if center <= 1:
        raise ValueError(f"center: expected more than 1, got {center}")
    density = [math.exp(-((layer - center) ** 2) / 2) for layer in range(1, means.shape[0] + 1)]
    scale = _SHARE_BEFORE_CENTER / sum(density[: math.ceil(center) - 1])
    target = [scale * value for value in density]
    # A layer far from the center has a target of 0, also where only its dtype rounds it to that;
    # t · ln t is 0 there. The sum of these is a constant.
    entropy = sum(value * math.log(value) for value in target if value > 0)
    wide = means.to(wide_dtype(means.dtype))
    least = torch.finfo(wide.dtype).tiny
    share = (wide / wide.sum().clamp(min=least)).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
    weights = torch.tensor(target, dtype=wide.dtype).to(means.device)
    loss = (entropy - (weights * share.log()).sum()) / means.shape[0]
    return loss.clamp(min=0).to(means.dtype)
