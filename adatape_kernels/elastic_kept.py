"""How rows and examples leave an elastic batch: `ElasticBatch.keep` and `keep_examples`."""

import dataclasses
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.arguments import check_tensor
from adatape_kernels.elastic_layout import ElasticLayout
from adatape_kernels.offsets import check_same_device

_Batch = TypeVar("_Batch", bound=ElasticLayout)


def with_rows_kept(batch: _Batch, mask: Tensor) -> tuple[_Batch, Tensor]:
    """Do what `ElasticBatch.keep` says."""
    _check_mask(mask, "rows", batch.data.shape[0], batch.data)
    packed, cu_inputs, cu_tapes, source = _compacted(batch, mask)
    return _with_rows(batch, packed, cu_inputs, cu_tapes), source


def with_examples_kept(batch: _Batch, mask: Tensor) -> tuple[_Batch, Tensor]:
    """Do what `ElasticBatch.keep_examples` says."""
    _check_mask(mask, "examples", batch.batch, batch.data)
    of_rows = F.pad(mask, (0, 1))[batch.example_of_rows()]
    packed, cu_inputs, cu_tapes, source = _compacted(batch, of_rows)
    # Examples that leave have no rows between these offsets, so that theirs are simply dropped.
    stay = F.pad(mask, (0, 1), value=True)
    return _with_rows(batch, packed, cu_inputs[stay], cu_tapes[stay]), source


def _compacted(batch: ElasticLayout, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The ops build on this layout, so that theirs is called by the name that torch has for it.
    return torch.ops.adatape.compact_rows(batch.data, mask, batch.cu_inputs, batch.cu_tapes, None)


def _with_rows(batch: _Batch, data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor) -> _Batch:
    input_lens, tape_lens = torch.stack([cu_inputs, cu_tapes]).diff().tolist()
    kept = dataclasses.replace(
        batch,
        data=data,
        cu_inputs=cu_inputs,
        cu_tapes=cu_tapes,
        num_input_rows=sum(input_lens),
        min_inputs=min(input_lens, default=0),
        max_inputs=max(input_lens, default=0),
        max_tapes=max(tape_lens, default=0),
        exact=True,
        row_multiple=1,
    )
    return kept.round_rows(batch.row_multiple) if batch.row_multiple > 1 else kept


def _check_mask(mask: Tensor, what: str, count: int, data: Tensor) -> None:
    check_tensor("mask", mask)
    if mask.shape != (count,) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool ({count},), the number of {what}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    check_same_device("mask", mask, data)
