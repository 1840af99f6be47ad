"""The gradients of `tape_gather` in Triton: a dot product a weight, a segment sum for the bank."""

import functools

import torch
from torch import Tensor

from adatape_kernels.ops.tape_gather.triton_primitives import BLOCK_D, offsets_of, token_row
from adatape_kernels.ops.triton_runtime import kernel, launch, tl, triton
from adatape_kernels.ops.triton_segment_sum import segment_sum
from adatape_kernels.ops.triton_specialization import (
    bank_strides,
    compiled_for,
    elements_per_access,
    with_dense_rows,
)


@compiled_for(aligned=("dtape_ptr", "bank_ptr"))
def _tape_gather_bwd_kernel(
    dtape_ptr,
    bank_ptr,
    indices_ptr,
    offsets_ptr,
    dweights_ptr,
    entries_ptr,
    row_of_ptr,
    stride_tr,
    stride_bb,
    stride_bm,
    num_tape_tokens,
    bank_size,
    dim,
    num_rows,
    TOPK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dweights[token, j] = dtape[row] · bank[indices[token, j]]: one token.

    Notes each read's entry and row for `segment_sum`.
    """
    token = tl.program_id(0)
    example, row, exists = token_row(token, offsets_ptr, num_tape_tokens, num_rows)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOPK
    reads = token.to(tl.int64) * TOPK + offs_k
    entry = tl.full((BLOCK_K,), bank_size, tl.int32)
    dweight = tl.full((BLOCK_K,), 0.0, tl.float32)
    if exists:
        entry = tl.load(indices_ptr + reads, mask_k, other=0)
        entry = tl.minimum(tl.maximum(entry, 0), bank_size - 1)
        start = tl.multiple_of(example * stride_bb + entry.to(tl.int64) * stride_bm, VECTOR)
        row_ptr = dtape_ptr + tl.multiple_of(row * stride_tr, VECTOR)
        for d in range(0, dim, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = tl.max_constancy(offs_d < dim, VECTOR)
            mask = mask_k[:, None] & mask_d
            value = tl.load(bank_ptr + start[:, None] + offs_d, mask, other=0.0)
            dmerged = tl.load(row_ptr + offs_d, mask_d, other=0.0)
            dweight += tl.sum(value.to(tl.float32) * dmerged.to(tl.float32), 1)
    tl.store(dweights_ptr + reads, dweight, mask_k)
    tl.store(entries_ptr + reads, entry, mask_k)
    tl.store(row_of_ptr + reads, row.to(tl.int32), mask_k)


@functools.cache
def _block(topk: int) -> dict[str, int]:
    """Return the block of a token's reads, and the warps that it takes."""
    block_k = triton.next_power_of_2(topk)
    return {"BLOCK_K": block_k, "num_warps": min(max(block_k * BLOCK_D // 1024, 1), 8)}


@kernel()
def tape_gather_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; the bank's gradient is summed in a fixed order if torch asks for it."""
    batch, num_tape_tokens, topk = indices.shape
    bank_size, dim = bank.shape[-2:]
    if indices.numel() == 0 or bank.numel() == 0:
        return bank.new_zeros(bank.shape), weights.new_zeros(weights.shape)
    dtape, bank, indices = with_dense_rows(dtape), with_dense_rows(bank), indices.contiguous()
    offsets, _ = offsets_of(counts, indices, bank_size, check_indices=False)
    dweights = weights.new_empty(weights.shape)
    entries, row_of = (indices.new_empty(batch, num_tape_tokens * topk) for _ in range(2))
    strides = bank_strides(bank)
    launch(
        _tape_gather_bwd_kernel,
        (batch * num_tape_tokens,),
        dtape_ptr=dtape,
        bank_ptr=bank,
        indices_ptr=indices,
        offsets_ptr=offsets,
        dweights_ptr=dweights,
        entries_ptr=entries,
        row_of_ptr=row_of,
        stride_tr=dtape.stride(0),
        stride_bb=strides.example,
        stride_bm=strides.entry,
        num_tape_tokens=num_tape_tokens,
        bank_size=bank_size,
        dim=dim,
        num_rows=len(dtape),
        TOPK=topk,
        VECTOR=elements_per_access(bank, dtape),
        BLOCK_D=BLOCK_D,
        **_block(topk),
    )
    dbank = segment_sum(
        dtape,
        entries.flatten() if bank.dim() == 2 else entries,
        bank_size,
        bank.dtype,
        row_of=row_of,
        weights=weights.contiguous(),
        ordered=torch.are_deterministic_algorithms_enabled(),
    )
    return dbank, dweights
