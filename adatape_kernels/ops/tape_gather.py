"""Variable-length gathering: tape tokens of every example, packed with no gap (SPEC 4).

tape[offsets[i] + s] = Σ_j weights[i, s, j] · bank[indices[i, s, j]]   for s < counts[i]
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels._triton import launch, tl, triton, vector
from adatape_kernels.backend import (
    define_autograd,
    define_op,
    register,
    register_compiled,
    register_triton,
)
from adatape_kernels.ops.scatter import scatter_rows
from adatape_kernels.reference import wide_dtype


def tape_gather(
    bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    counts: Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the bank tokens of each read into tape tokens, packed example after example.

    Args:
        bank: (bank_size, dim), shared, or (batch, bank_size, dim); float32, float16, bfloat16 or
            float64.
        indices: (batch, num_tape_tokens, topk) int32 entries of the bank.
        weights: the same shape, float32 (float64 for a float64 bank).
        counts: (batch,) int32; rows of an example from there on are ignored.
        capacity: tape rows to return, used or not; None for exactly the used ones, which copies
            their number to the host.

    Returns:
        tape (total or capacity, dim), dtype of bank, accumulated in float32, zero in unused rows;
        and the offsets (batch + 1,) int32 of each example's rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, an index lies outside the
            bank, a count outside 0 to num_tape_tokens, or the capacity is too small.

    With a capacity Triton's kernels on a GPU copy nothing to the host, so that no value is refused:
    an index outside the bank moves to the nearest entry, a count into 0 to num_tape_tokens, and
    rows beyond the capacity are dropped, which `offsets[-1] > capacity` shows.

    Differentiable in bank and weights. Under `torch.compile(fullgraph=True)` without a capacity,
    torch needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True`.

    Source: SPEC 4; scenic adatape/layers.py, ACTFunction.act_step.
    """
    bank_shape, shape, dtype = bank.shape, indices.shape, bank.dtype
    if len(bank_shape) not in (2, 3) or not dtype.is_floating_point:
        raise ValueError(
            "bank: expected floating-point ([batch,] bank_size, dim), "
            f"got {dtype} {tuple(bank_shape)}"
        )
    if len(shape) != 3 or indices.dtype != torch.int32:
        raise ValueError(
            "indices: expected int32 (batch, num_tape_tokens, topk), "
            f"got {indices.dtype} {tuple(shape)}"
        )
    batch = shape[0]
    if len(bank_shape) == 3 and bank_shape[0] != batch:
        raise ValueError(f"bank: expected batch {batch} like indices, got {tuple(bank_shape)}")
    if weights.shape != shape or weights.dtype != wide_dtype(dtype):
        raise ValueError(
            f"weights: expected {wide_dtype(dtype)} {tuple(shape)} like indices, "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    if counts.shape != (batch,) or counts.dtype != torch.int32:
        raise ValueError(
            f"counts: expected int32 ({batch},), got {counts.dtype} {tuple(counts.shape)}"
        )
    check_capacity(capacity)
    device = bank.device
    for name, tensor in (("indices", indices), ("weights", weights), ("counts", counts)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")
    return _tape_gather(bank, indices, weights, counts, capacity)


def check_capacity(capacity: int | None) -> None:
    """Refuse a negative number of tape rows."""
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected 0 or more tape rows, got {capacity}")


@triton.jit
def _tape_gather_offsets_kernel(
    counts_ptr,
    indices_ptr,
    offsets_ptr,
    status_ptr,
    batch,
    num_tape_tokens,
    bank_size,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the counts in program 0, and check the entries that are read in the others, if any.

    The status is the total, and 1 where a count or an entry is corrupt; it comes as zeros.
    """
    offs = tl.arange(0, BLOCK)
    corrupt = tl.zeros((BLOCK,), tl.int1)
    if tl.program_id(0) == 0:
        total = 0
        tl.store(offsets_ptr, total)
        for start in range(0, batch, BLOCK):
            mask = start + offs < batch
            given = tl.load(counts_ptr + start + offs, mask, other=0)
            count = tl.minimum(tl.maximum(given, 0), num_tape_tokens)
            tl.store(offsets_ptr + 1 + start + offs, total + tl.cumsum(count, 0), mask)
            total += tl.sum(count, 0)
            corrupt |= count != given
        tl.store(status_ptr, total)
    else:
        reads = (tl.program_id(0) - 1).to(tl.int64) * BLOCK + offs
        token = (reads // TOPK).to(tl.int32)
        example = token // num_tape_tokens
        mask = example < batch
        mask &= token % num_tape_tokens < tl.load(counts_ptr + example, mask, other=0)
        entry = tl.load(indices_ptr + reads, mask, other=0)
        corrupt = mask & ((entry < 0) | (entry >= bank_size))
    tl.atomic_max(status_ptr + 1, tl.max(corrupt.to(tl.int32), 0), sem="relaxed")


@triton.jit
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
        example, row, exists = _token_row(token, offsets_ptr, num_tape_tokens, num_rows)
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


@triton.jit
def _token_row(token, offsets_ptr, num_tape_tokens, num_rows):
    """Return a token's example and row, int64, and whether the row exists."""
    example = token // num_tape_tokens
    row = tl.load(offsets_ptr + example) + token % num_tape_tokens
    exists = row < tl.minimum(tl.load(offsets_ptr + example + 1), num_rows)
    return example.to(tl.int64), row.to(tl.int64), exists


@triton.jit
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

    Notes each read's entry and row for `scatter_rows`.
    """
    token = tl.program_id(0)
    example, row, exists = _token_row(token, offsets_ptr, num_tape_tokens, num_rows)
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


_BLOCK_COUNTS = 1024
# A warp covers these by one access of 16 bytes a lane at 16 bits a feature, by two at 32.
_BLOCK_D = 256


def _offsets(
    counts: Tensor, indices: Tensor, bank_size: int, *, check: bool
) -> tuple[Tensor, Tensor]:
    """Return the offsets (batch + 1,) and the status (2,), int32 on the device."""
    offsets, status = counts.new_empty(len(counts) + 1), counts.new_zeros(2)
    checks = triton.cdiv(indices.numel(), _BLOCK_COUNTS) if check else 0
    launch(
        _tape_gather_offsets_kernel,
        (1 + checks,),
        counts.contiguous(),
        indices,
        offsets,
        status,
        len(counts),
        indices.shape[1],
        bank_size,
        TOPK=max(indices.shape[2], 1),
        BLOCK=_BLOCK_COUNTS,
        num_warps=4,
    )
    return offsets, status


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _triton_fwd(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    batch, num_tape_tokens, topk = indices.shape
    bank_size, dim = bank.shape[-2:]
    bank, indices, weights = _dense_rows(bank), indices.contiguous(), weights.contiguous()
    offsets, status = _offsets(counts, indices, bank_size, check=capacity is None)
    if capacity is None:
        num_rows, suspect = status.tolist()
    else:
        num_rows, suspect = capacity, bank.device.type == "cpu"  # where looking costs no copy
    if suspect:
        check_values(bank, indices, counts, capacity)
    if indices.numel() == 0 or bank.numel() == 0:
        return bank.new_zeros(num_rows, dim), offsets
    tape = bank.new_empty(num_rows, dim)
    launch(
        _tape_gather_fwd_kernel,
        (max(batch * num_tape_tokens, num_rows), triton.cdiv(dim, _BLOCK_D)),
        bank,
        indices,
        weights,
        offsets,
        tape,
        0 if bank.dim() == 2 else bank.stride(0),
        bank.stride(-2),
        batch,
        num_tape_tokens,
        bank_size,
        dim,
        num_rows,
        TOPK=topk,
        VECTOR=vector(bank),
        BLOCK_D=_BLOCK_D,
        num_warps=1,
    )
    return tape, offsets


def _triton_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    batch, num_tape_tokens, topk = indices.shape
    bank_size, dim = bank.shape[-2:]
    if indices.numel() == 0 or bank.numel() == 0:
        return bank.new_zeros(bank.shape), weights.new_zeros(weights.shape)
    dtape, bank, indices = _dense_rows(dtape), _dense_rows(bank), indices.contiguous()
    offsets, _ = _offsets(counts, indices, bank_size, check=False)
    dweights = weights.new_empty(weights.shape)
    entries, row_of = indices.new_empty(2, batch, num_tape_tokens * topk)
    block_k = triton.next_power_of_2(topk)
    launch(
        _tape_gather_bwd_kernel,
        (batch * num_tape_tokens,),
        dtape,
        bank,
        indices,
        offsets,
        dweights,
        entries,
        row_of,
        dtape.stride(0),
        0 if bank.dim() == 2 else bank.stride(0),
        bank.stride(-2),
        num_tape_tokens,
        bank_size,
        dim,
        len(dtape),
        TOPK=topk,
        VECTOR=vector(bank, dtape),
        BLOCK_K=block_k,
        BLOCK_D=_BLOCK_D,
        num_warps=min(max(block_k * _BLOCK_D // 1024, 1), 8),
    )
    dbank = scatter_rows(
        dtape,
        entries.flatten() if bank.dim() == 2 else entries,
        bank_size,
        bank.dtype,
        row_of=row_of,
        weights=weights.contiguous(),
        ordered=torch.are_deterministic_algorithms_enabled(),
    )
    return dbank, dweights


def _fake(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return bank.new_empty(rows, bank.shape[-1]), counts.new_empty(counts.shape[0] + 1)


def _fake_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return bank.new_empty(bank.shape), weights.new_empty(weights.shape)


_tape_gather = define_op(
    "tape_gather(Tensor bank, Tensor indices, Tensor weights, Tensor counts, SymInt? capacity) "
    "-> (Tensor tape, Tensor offsets)",
    _fake,
)
_tape_gather_bwd = define_op(
    "tape_gather_bwd(Tensor dtape, Tensor bank, Tensor indices, Tensor weights, Tensor counts) "
    "-> (Tensor dbank, Tensor dweights)",
    _fake_bwd,
)


def check_values(bank: Tensor, indices: Tensor, counts: Tensor, capacity: int | None) -> None:
    """Refuse corrupt counts and indices, and a capacity that is too small; copies to the host."""
    num_tape_tokens, bank_size = indices.shape[1], bank.shape[-2]
    if bool(((counts < 0) | (counts > num_tape_tokens)).any()):
        raise ValueError(f"counts: expected 0 to {num_tape_tokens}, got {counts.tolist()}")
    total = int(counts.sum())
    if capacity is not None and total > capacity:
        raise ValueError(f"capacity: expected at least the {total} tape rows read, got {capacity}")
    read = indices[torch.arange(num_tape_tokens, device=counts.device) < counts.unsqueeze(1)]
    outside = (read < 0) | (read >= bank_size)
    if bool(outside.any()):
        raise ValueError(
            f"indices: expected 0 to {bank_size - 1} (inside the bank) where read, "
            f"got {int(read[outside][0])}"
        )


@register("tape_gather", "eager")
def _eager(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    check_values(bank, indices, counts, capacity)
    return reference.tape_gather(bank, indices, weights, counts, capacity=capacity)


register("tape_gather_bwd", "eager")(reference.tape_gather_bwd)


register_compiled("tape_gather")
register_compiled("tape_gather_bwd")

register_triton("tape_gather")(_triton_fwd)
register_triton("tape_gather_bwd")(_triton_bwd)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dtape: Tensor, doffsets: Any) -> tuple:
    dbank, dweights = _tape_gather_bwd(dtape, *ctx.saved_tensors)
    return dbank, None, dweights, None, None


define_autograd("tape_gather", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.tape_gather, get_raw=True)
def _flops(bank: Tensor, indices: Tensor, *rest: Any, out_val: tuple, **names: Any) -> int:
    """One multiply-add a feature and bank token that is merged."""
    return 2 * int(out_val[1][-1]) * indices.shape[2] * bank.shape[-1]


@register_flop_formula(torch.ops.adatape.tape_gather_bwd, get_raw=True)
def _flops_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, **names: Any
) -> int:
    """The same for the bank's gradient, and a dot product for each weight's."""
    return 4 * int(counts.sum()) * indices.shape[2] * bank.shape[-1]
