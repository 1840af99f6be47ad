"""The kinds of rows that a layer takes, and how its result comes back in the kind that it took."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.elastic import ElasticBatch

Rows = TypeVar("Rows", ElasticBatch, Tensor, tuple[Tensor, Tensor])
"""Rows of examples: an elastic batch, a plain or a jagged tensor, or a padded one with its mask."""

_KINDS = (
    "an ElasticBatch, a Tensor (batch, seqlen, dim), a pair (Tensor, mask) or a jagged Tensor, "
    "of floating point"
)


def as_batch(x: Any, dim: int) -> ElasticBatch:
    """Return what a layer is given as an elastic batch.

    Args:
        x: an elastic batch, which is returned as it is; a tensor (batch, seqlen, dim), all of whose
            rows are input rows; a pair of such a tensor and a mask (batch, seqlen) that is True
            where a row is valid; or a nested tensor (batch, *, dim) of layout torch.jagged.
        dim: how many features a row must have.

    Raises:
        TypeError: it is none of these.
        ValueError: rows have another number of features, the mask does not match, or the jagged
            tensor is not a contiguous one.
    """
    batch = _batch(x)
    if batch.data.shape[1:] != (dim,):
        raise ValueError(f"x: expected rows of ({dim},), got {tuple(batch.data.shape[1:])}")
    return batch


def _batch(x: Any) -> ElasticBatch:
    if isinstance(x, ElasticBatch):
        return x
    if isinstance(x, Tensor):
        if x.is_nested and x.layout == torch.jagged and x.is_floating_point():
            return _from_jagged(x)
        if _is_plain(x):
            return ElasticBatch.from_padded(x)
    elif isinstance(x, tuple) and len(x) == 2 and _is_plain(x[0]) and isinstance(x[1], Tensor):
        _check_mask(x[1], x[0])
        return ElasticBatch.from_padded(*x)
    raise TypeError(f"x: expected {_KINDS}, got {_described(x)}")


def in_kind(
    y: ElasticBatch, x: Any, batch: ElasticBatch, *, appended: bool = False, static: bool = False
) -> Any:
    """Return a layer's result in the kind of what it was given.

    Args:
        y: the result; its input rows lie where those of `batch` lie.
        x: what the layer was given.
        batch: what `as_batch` made of it.
        appended: whether rows were appended to the examples. If not, the result has the shape of
            x, its mask and its ragged dimension; if they were, it is what `to_padded` and
            `to_nested` give, of the former without a mask for a plain tensor.
        static: whether padding is up to the most rows that an example can have, which is known
            beforehand, instead of the rows of the longest example.
    """
    if isinstance(x, ElasticBatch):
        return y
    rows = y.data[: batch.num_input_rows]
    if isinstance(x, Tensor) and x.is_nested:
        if appended:
            return y.to_nested()
        # The ragged dimensions of two nested tensors are the same if their offsets are one object.
        jagged: Any = x
        return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets())
    if appended:
        padded, mask = y.to_padded(y.max_rows if static else None)
        return padded if isinstance(x, Tensor) else (padded, mask)
    if isinstance(x, Tensor):
        return rows.view(*x.shape[:2], rows.shape[1])
    padded, mask = x
    return rows.new_zeros(*padded.shape[:2], rows.shape[1]).index_put((mask,), rows), mask


def _is_plain(x: Any) -> bool:
    """Whether this is a dense tensor (batch, seqlen, dim) of real numbers."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
        return False
    return x.dim() == 3 and x.is_floating_point()


def _check_mask(mask: Tensor, padded: Tensor) -> None:
    dense = not mask.is_nested and mask.layout == torch.strided
    if not dense or mask.dtype != torch.bool or mask.shape != padded.shape[:2]:
        raise ValueError(
            f"x[1]: expected a mask torch.bool {tuple(padded.shape[:2])} like x[0], "
            f"got {_described(mask)}"
        )
    if mask.device != padded.device:
        raise ValueError(f"x[1]: expected a mask on {padded.device} like x[0], got {mask.device}")


def _from_jagged(x: Tensor) -> ElasticBatch:
    try:
        return ElasticBatch.from_nested(x)
    except ValueError as error:
        raise ValueError(str(error).replace("nested:", "x:", 1)) from None


def _described(x: Any) -> str:
    """Return in words what a layer was given."""
    if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided):
        return f"a {'nested ' if x.is_nested else ''}Tensor of layout {x.layout}"
    if isinstance(x, tuple):
        return f"({', '.join(map(_described, x))})"
    simple = x is None or isinstance(x, Tensor | str | int | float)
    return shown(x) if simple else f"an object of type {type(x).__name__}"
