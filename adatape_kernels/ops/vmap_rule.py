"""How `torch.func.vmap` maps an op of ours: a call for each element, and their results stacked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(name: str, overload: Any) -> Callable[..., tuple]:
    """Return a rule as `torch.library.register_vmap` takes it.

    A ragged op mixes lengths freely, but stacked results must have one shape.

    Args:
        name: the op's, for a message.
        overload: the op.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        if info.batch_size == 0:
            raise NotImplementedError(f"{name}: expected vmap over at least one element, got none")
        if overload._schema.is_mutable and in_dims[0] is None:
            raise NotImplementedError(
                f"{name}: expected vmap over what it writes into, too, got one for all elements"
            )
        results = [
            overload(
                *(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return _stacked(name, results), 0
        if overload._schema.is_mutable:
            return None, None
        stacked = tuple(_stacked(name, parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _stacked(name: str, parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise NotImplementedError(
            f"{name}: expected results of one shape under vmap, which reading gives with a "
            f"capacity, got {', '.join(map(str, shapes))}"
        )
    return torch.stack(parts)
