"""The gradients of the weights that bank entries were merged with into tape tokens, in Triton."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.triton_reading import BLOCK_D, token_row
from adatape_kernels.ops.triton_runtime import launch, tl, triton
from adatape_kernels.ops.triton_specialization import (
    bank_strides,
    compiled_for,
    elements_per_access,
)


@compiled_for(aligned=("dtape_ptr", "bank_ptr", "dbank_ptr"))
def _tape_gather_bwd_kernel(
    dtape_ptr,
    bank_ptr,
    indices_ptr,
    offsets_ptr,
    given_ptr,
    weights_ptr,
    dweights_ptr,
    dbank_ptr,
    entries_ptr,
    row_of_ptr,
    stride_tr,
    stride_bb,
    stride_bm,
    num_tape_tokens,
    bank_size,
    dim,
    key_dim,
    num_rows,
    TOPK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dweights[token, j] = given[token, j] + dtape[row] · bank[indices[token, j]]: one token.

    Where a gradient of the examples' own banks is given, the program stores what the token adds to
    the features from key_dim on. Else it notes each read's entry and row for `segment_sum`: for an
    entry that was read and whose row does not exist, a row of -1.
    """
    token = tl.program_id(0)
    example, row, exists = token_row(token, offsets_ptr, num_tape_tokens, num_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOPK
    reads = token.to(tl.int64) * TOPK + offs_k
    entry = tl.full((BLOCK_K,), bank_size, tl.int32)
    dweight = tl.full((BLOCK_K,), 0.0, tl.float32)
    if given_ptr is not None:
        dweight = tl.load(given_ptr + reads, mask_k, other=0.0)
    if row < tl.load(offsets_ptr + example + 1):
        entry = tl.load(indices_ptr + reads, mask_k, other=0)
        entry = tl.minimum(tl.maximum(entry, 0), bank_size - 1)
    if exists:
        start = tl.multiple_of(example * stride_bb + entry.to(tl.int64) * stride_bm, VECTOR)
        row_ptr = dtape_ptr + tl.multiple_of(row * stride_tr, VECTOR)
        for d in range(0, dim, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = tl.max_constancy(offs_d < dim, VECTOR)
            mask = mask_k[:, None] & mask_d
            value = tl.load(bank_ptr + start[:, None] + offs_d, mask, other=0.0)
            dmerged = tl.load(row_ptr + offs_d, mask_d, other=0.0).to(tl.float32)
            dweight += tl.sum(value.to(tl.float32) * dmerged, 1)
            if dbank_ptr is not None:
                weight = tl.load(weights_ptr + reads, mask_k, other=0.0)
                out = tl.multiple_of((example * bank_size + entry) * dim, VECTOR)
                added = (weight[:, None] * dmerged).to(dbank_ptr.dtype.element_ty)
                mask &= tl.max_constancy(offs_d >= key_dim, VECTOR)
                tl.store(dbank_ptr + out[:, None] + offs_d, added, mask)
    tl.store(dweights_ptr + reads, dweight, mask_k)
    if entries_ptr is not None:
        tl.store(entries_ptr + reads, entry, mask_k)
        tl.store(row_of_ptr + reads, tl.where(exists, row, -1).to(tl.int32), mask_k)


@functools.cache
def _block(topk: int) -> dict[str, int]:
    """Return the block of a token's reads, and the warps that it takes."""
    block_k = triton.next_power_of_2(topk)
    return {"BLOCK_K": block_k, "num_warps": min(max(block_k * BLOCK_D // 1024, 1), 8)}


class ReadPlaces(NamedTuple):
    """Where each read's contribution to a bank's gradient comes from and goes, for `segment_sum`.

    Both are (batch, num_tape_tokens · topk) int32.
    """

    entries: Tensor
    """The entry; bank_size where nothing was read."""
    row_of: Tensor
    """The row of the tape; -1 where the tape ends before it."""


def no_places_yet(indices: Tensor) -> ReadPlaces:
    """Return room for the places of these reads (batch, num_tape_tokens, topk)."""
    batch, num_tape_tokens, topk = indices.shape
    reads = num_tape_tokens * topk
    return ReadPlaces(indices.new_empty(batch, reads), indices.new_empty(batch, reads))


class OwnBankGradient(NamedTuple):
    """The gradient of the examples' own banks, of whose entries no example reads one twice."""

    dbank: Tensor
    """(batch, bank_size, dim), contiguous."""
    key_dim: int
    """From this feature on the rows of the entries that were read are written."""
    weights: Tensor
    """(batch, num_tape_tokens, topk), contiguous, what the entries were merged with."""


def weight_gradients(
    dtape: Tensor,
    bank: Tensor,
    indices: Tensor,
    offsets: Tensor,
    to: ReadPlaces | OwnBankGradient,
    *,
    given: Tensor | None = None,
) -> Tensor:
    """Return the gradients of the weights that entries were merged with, shaped as indices.

    Args:
        dtape: (rows, dim), as `with_dense_rows` returns it.
        bank: ([batch,] bank_size, dim), likewise.
        indices: (batch, num_tape_tokens, topk) int32, contiguous.
        offsets: (batch + 1,) int32, where the rows of each example begin.
        to: what is written beside them, whole or in part.
        given: what else adds to these gradients, shaped as indices, float32, contiguous.
    """
    batch, num_tape_tokens, topk = indices.shape
    bank_size, dim = bank.shape[-2:]
    dweights = indices.new_empty(batch, num_tape_tokens, topk, dtype=torch.float32)
    vector = elements_per_access(bank, dtape)
    weights = dbank = entries = row_of = None
    key_dim = 0
    if isinstance(to, ReadPlaces):
        entries, row_of = to
    else:
        dbank, key_dim, weights = to
        if key_dim % vector:
            vector = 1
    num_rows, _ = dtape.shape
    stride_tr, _ = dtape.stride()
    stride_bb, stride_bm = bank_strides(bank)
    launch(
        _tape_gather_bwd_kernel,
        (batch * num_tape_tokens,),
        dtape_ptr=dtape,
        bank_ptr=bank,
        indices_ptr=indices,
        offsets_ptr=offsets,
        given_ptr=given,
        weights_ptr=weights,
        dweights_ptr=dweights,
        dbank_ptr=dbank,
        entries_ptr=entries,
        row_of_ptr=row_of,
        stride_tr=stride_tr,
        stride_bb=stride_bb,
        stride_bm=stride_bm,
        num_tape_tokens=num_tape_tokens,
        bank_size=bank_size,
        dim=dim,
        key_dim=key_dim,
        num_rows=num_rows,
        TOPK=topk,
        VECTOR=vector,
        BLOCK_D=BLOCK_D,
        **_block(topk),
    )
    return dweights
