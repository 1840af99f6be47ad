"""`tape_gather` in Triton: a launch for the offsets, and one that merges and stores every token."""

from torch import Tensor

from adatape_kernels.ops.reading_checks import check_reads
from adatape_kernels.ops.triton_reading import BLOCK_D, offsets_of, token_row
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    bank_strides,
    compiled_for,
    elements_per_access,
    with_dense_rows,
)


@compiled_for(aligned=("bank_ptr", "tape_ptr"))
def _tape_gather_fwd_kernel(
    bank_ptr,
    indices_ptr,
    weights_ptr,
    offsets_ptr,
    tape_ptr,
    stride_bb,
    stride_bm,
    batch,
    num_tape_tokens,
    bank_size,
    dim,
    num_rows,
    TOPK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program p merges token p of all that may exist, and clears row p if it is unused."""
    token = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < dim, VECTOR)
    merged = tl.full((BLOCK_D,), 0.0, tl.float32)
    if token >= tl.load(offsets_ptr + batch) and token < num_rows:
        row_ptr = tape_ptr + tl.multiple_of(token.to(tl.int64) * dim, VECTOR)
        tl.store(row_ptr + offs_d, merged.to(tape_ptr.dtype.element_ty), mask_d)
    if token // num_tape_tokens < batch:
        example, row, exists = token_row(token, offsets_ptr, num_tape_tokens, num_rows)
        if exists:
            reads = token.to(tl.int64) * TOPK
            for j in tl.static_range(TOPK):
                entry = tl.load(indices_ptr + reads + j)
                entry = tl.minimum(tl.maximum(entry, 0), bank_size - 1).to(tl.int64)
                start = tl.multiple_of(example * stride_bb + entry * stride_bm, VECTOR)
                value = tl.load(bank_ptr + start + offs_d, mask_d, other=0.0).to(tl.float32)
                merged += tl.load(weights_ptr + reads + j) * value
            row_ptr = tape_ptr + tl.multiple_of(row * dim, VECTOR)
            tl.store(row_ptr + offs_d, merged.to(tape_ptr.dtype.element_ty), mask_d)


@kernel()
def tape_gather(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; without a capacity their findings come to the host with the row count."""
    batch, num_tape_tokens, topk = indices.shape
    bank_size, dim = bank.shape[-2:]
    bank, indices, weights = with_dense_rows(bank), indices.contiguous(), weights.contiguous()
    offsets, status = offsets_of(counts, indices, bank_size, checked=capacity is None)
    num_rows = 0 if capacity is None else capacity
    if status is not None:
        num_rows, corrupt = status.tolist()
        if corrupt:
            check_reads(bank, indices, counts, capacity)
    if indices.numel() == 0 or bank.numel() == 0:
        return bank.new_zeros(num_rows, dim), offsets
    tape = bank.new_empty(num_rows, dim)
    stride_bb, stride_bm = bank_strides(bank)
    launch(
        _tape_gather_fwd_kernel,
        (max(batch * num_tape_tokens, num_rows), num_blocks(dim, BLOCK_D)),
        bank_ptr=bank,
        indices_ptr=indices,
        weights_ptr=weights,
        offsets_ptr=offsets,
        tape_ptr=tape,
        stride_bb=stride_bb,
        stride_bm=stride_bm,
        batch=batch,
        num_tape_tokens=num_tape_tokens,
        bank_size=bank_size,
        dim=dim,
        num_rows=num_rows,
        TOPK=topk,
        VECTOR=elements_per_access(bank),
        BLOCK_D=BLOCK_D,
        num_warps=1,
    )
    return tape, offsets
