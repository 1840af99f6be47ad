"""Position embeddings of a grid of patches, interpolated for grids of other sizes (SPEC 6)."""

import functools

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.layers.without_autocast import without_autocast

# Pairs of lengths whose weights are kept: 12 KiB for a grid of 28 that is made from one of 56.
_KEPT_PAIRS = 1024


def grid_positions(position: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the position embeddings of a grid.

    The model's own grid has the parameter's rows as they are. Any other grid has them interpolated
    along either axis by `_weights`, in float32 or wider. Rows for tokens in front of the patches
    are never changed.

    Args:
        position: (1, front + rows · columns, dim), the parameter.
        own: the rows and columns of the parameter's grid.
        grid: the rows and columns that are asked for.

    Returns:
        (front + rows · columns of `grid`, dim), dtype of position.
    """
    if grid == own:
        return position[0]
    front = position.shape[1] - own[0] * own[1]
    # Products would be computed in another dtype under autocast.
    with without_autocast(position.device):
        wide = torch.promote_types(position.dtype, torch.float32)
        patches = position[0, front:].to(wide)
        patches = _matrix(own[0], grid[0], patches) @ patches.unflatten(0, own).flatten(1)
        patches = patches.view(grid[0], own[1], -1)
        patches = (_matrix(own[1], grid[1], patches) @ patches).flatten(0, 1)
    return torch.cat([position[0, :front], patches.to(position.dtype)])


def _matrix(old: int, new: int, like: Tensor) -> Tensor:
    """Return the weights (new, old) as a tensor of the dtype and on the device of another."""
    weights = torch.from_numpy(_weights(old, new))
    return weights.to(device=like.device, dtype=like.dtype, non_blocking=True)


@functools.lru_cache(_KEPT_PAIRS)
def _weights(old: int, new: int) -> np.ndarray:
    """Return float64 weights (new, old) with which `new` points are interpolated from `old`.

    They are those of torch's and Pillow's bicubic interpolation with antialiasing: the kernel of
    Keys with a = -1/2, stretched by old / new where the grid shrinks. Weights beyond a border are
    dropped, and those that are left are scaled to a sum of 1.
    """
    step = old / new
    centres = (np.arange(new) + 0.5) * step
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(step, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
