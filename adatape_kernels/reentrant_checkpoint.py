"""Refuses the checkpoints of torch that would lose gradients in silence."""

import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class HoldsData(Protocol):
    """A batch that holds its rows in one tensor, as `ElasticBatch` does."""

    @property
    def data(self) -> Tensor:
        """The rows."""
        ...


def refuse_reentrant_checkpoint(batch: HoldsData) -> None:
    """Raise RuntimeError where a reentrant checkpoint was given batches that require gradients.

    It runs its function without autograd, and later asks for gradients of the bare tensors among
    its arguments, so that those of a batch would be lost in silence.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not batch.data.requires_grad:
        return  # as nearly always: what is computed without autograd requires no gradient
    checkpoints: Any = sys.modules.get("torch.utils.checkpoint")
    frame = sys._getframe() if checkpoints is not None else None
    while frame is not None:
        if frame.f_code is checkpoints.CheckpointFunction.forward.__code__:
            given = _batches(frame.f_locals["args"], type(batch))
            if any(each.data.requires_grad for each in given):
                raise RuntimeError(
                    "use_reentrant: expected False, as a reentrant checkpoint finds no tensors in "
                    "an ElasticBatch, got True"
                )
            return
        frame = frame.f_back


def _batches(given: Any, kind: type[HoldsData]) -> Iterator[HoldsData]:
    """Yield the batches in arguments, in containers too."""
    if isinstance(given, kind):
        yield given
    elif isinstance(given, list | tuple | dict):
        for part in given.values() if isinstance(given, dict) else given:
            yield from _batches(part, kind)
