"""The gradients of queries and of the keys that they have read, in Triton.

`reference.tape_select_bwd` states the formula. `tape_select` and `tape_read` differ in what becomes
of a key's gradient: the latter merges a tape, which has a gradient as well.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.triton_reading import softmax
from adatape_kernels.ops.triton_runtime import launch, tl, triton
from adatape_kernels.ops.triton_specialization import (
    bank_strides,
    compiled_for,
    elements_per_access,
    with_dense_rows,
)


@triton.jit
def _read_entries(indices_ptr, mask_j, bank_size):
    """The entries of a step; inside the bank even where a caller's indices are not."""
    entries = tl.load(indices_ptr, mask=mask_j, other=0)
    return tl.minimum(tl.maximum(entries, 0), bank_size - 1)


@triton.jit
def _columns(key_rows, state_row, mask_j, offs_c, key_dim):
    """Some features of the read keys (BLOCK_J, BLOCK_C) and of a query (BLOCK_C,), in float32."""
    mask_c = offs_c < key_dim
    rows = tl.load(key_rows[:, None] + offs_c, mask=mask_j[:, None] & mask_c, other=0.0)
    return rows.to(tl.float32), tl.load(state_row + offs_c, mask=mask_c, other=0.0)


@compiled_for(
    aligned=("query_ptr", "keys_ptr", "states_ptr", "dquery_ptr", "drows_ptr", "dtape_ptr")
)
def _tape_select_bwd_kernel(
    query_ptr,
    keys_ptr,
    dweights_ptr,
    dponder_ptr,
    indices_ptr,
    counts_ptr,
    states_ptr,
    dquery_ptr,
    drows_ptr,
    dtape_ptr,
    weights_ptr,
    offsets_ptr,
    bank_size,
    key_dim,
    num_tape_tokens,
    topk,
    scale,
    stride_qb,
    stride_kb,
    stride_km,
    stride_dr,
    stride_tr,
    num_rows,
    AVERAGE_QUERY: tl.constexpr,
    ENTROPY: tl.constexpr,
    DROWS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One example: its queries again, then their gradients and those of the rows, backwards.

    Row s of the example's scratch `states_ptr` (batch, num_tape_tokens + 1, key_dim) holds the
    query of step s, and from its turn on that query's gradient. DROWS says what becomes of a row's
    gradient: "store" it in the example's own bank, "add" it to a bank that examples share, or
    "list" it, row after row as `indices_ptr` has them. Where a tape's gradient is given, what the
    merging into its tokens adds to these features is added before a row is rounded. WHOLE_ROWS says
    that keys have all features of their rows: the gradients of the weights that rows were merged
    with can then be computed here, and are added to those given.
    """
    keep: tl.constexpr = 0.5 if AVERAGE_QUERY else 0.0
    take: tl.constexpr = 0.5 if AVERAGE_QUERY else 1.0
    key_dim *= VECTOR  # so that the compiler sees whole vectors
    stride_dr *= VECTOR
    example = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(counts_ptr + example), 0), num_tape_tokens)
    dponder = tl.load(dponder_ptr + example)
    keys_ptr += example * stride_kb * VECTOR
    states_ptr += example * (num_tape_tokens + 1) * key_dim
    offs_j = tl.arange(0, BLOCK_J)
    mask_j = offs_j < topk

    for start_c in range(0, key_dim, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        q = tl.load(query_ptr + example * stride_qb + offs_c, mask=offs_c < key_dim)
        tl.store(states_ptr + offs_c, q.to(tl.float32), mask=offs_c < key_dim)
    tl.debug_barrier()
    for step in range(count - 1):
        out = (example * num_tape_tokens + step) * topk + offs_j
        entries = _read_entries(indices_ptr + out, mask_j, bank_size)
        key_rows = keys_ptr + entries.to(tl.int64) * stride_km * VECTOR
        q_row = states_ptr + step * key_dim
        scores = tl.zeros((BLOCK_J,), tl.float32)
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            rows, q = _columns(key_rows, q_row, mask_j, offs_c, key_dim)
            scores += tl.sum(rows * q, 1)
        weights = softmax(scores * scale, mask_j)
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            rows, q = _columns(key_rows, q_row, mask_j, offs_c, key_dim)
            merged = tl.sum(weights[:, None] * rows, 0)
            following = (q + merged) * 0.5 if AVERAGE_QUERY else merged
            tl.store(q_row + key_dim + offs_c, following, mask=offs_c < key_dim)
        tl.debug_barrier()

    for start_c in range(0, key_dim, BLOCK_C):  # nothing follows the last step
        offs_c = start_c + tl.arange(0, BLOCK_C)
        zeros = tl.zeros((BLOCK_C,), tl.float32)
        tl.store(states_ptr + count * key_dim + offs_c, zeros, mask=offs_c < key_dim)
    tl.debug_barrier()
    for following in range(count, 0, -1):
        step = following - 1
        out = (example * num_tape_tokens + step) * topk + offs_j
        entries = _read_entries(indices_ptr + out, mask_j, bank_size)
        key_rows = keys_ptr + entries.to(tl.int64) * stride_km * VECTOR
        q_row = states_ptr + step * key_dim
        scores = tl.zeros((BLOCK_J,), tl.float32)
        dw = tl.load(dweights_ptr + out, mask=mask_j, other=0.0)
        if dtape_ptr is not None:
            merged_with = tl.load(weights_ptr + out, mask=mask_j, other=0.0)
            row = tl.load(offsets_ptr + example) + step
            tape_row = dtape_ptr + row.to(tl.int64) * stride_tr * VECTOR
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            rows, q = _columns(key_rows, q_row, mask_j, offs_c, key_dim)
            dnext = tl.load(q_row + key_dim + offs_c, mask=offs_c < key_dim, other=0.0)
            scores += tl.sum(rows * q, 1)
            dmerged = take * dnext
            if WHOLE_ROWS:
                exists = (offs_c < key_dim) & (row < num_rows)
                dmerged += tl.load(tape_row + offs_c, mask=exists, other=0.0).to(tl.float32)
            dw += tl.sum(rows * dmerged, 1)
        weights = softmax(scores * scale, mask_j)
        if ENTROPY:
            dw -= 2.0 * dponder * weights
        else:  # equal maxima share the gradient
            best = tl.where(mask_j & (weights == tl.max(weights, 0)), 1.0, 0.0)
            dw -= dponder * tl.div_rn(best, tl.sum(best, 0))
        ds = weights * (dw - tl.sum(weights * dw, 0)) * scale
        if DROWS == "store":
            out = example * bank_size + entries
        elif DROWS == "add":
            out = entries.to(tl.int64)
        drow_ptrs = drows_ptr + out[:, None] * stride_dr
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            mask = mask_j[:, None] & (offs_c < key_dim)
            rows, q = _columns(key_rows, q_row, mask_j, offs_c, key_dim)
            dnext = tl.load(q_row + key_dim + offs_c, mask=offs_c < key_dim, other=0.0)
            drows = weights[:, None] * (take * dnext) + ds[:, None] * q
            if dtape_ptr is not None:
                exists = (offs_c < key_dim) & (row < num_rows)
                dmerged = tl.load(tape_row + offs_c, mask=exists, other=0.0)
                drows += merged_with[:, None] * dmerged.to(tl.float32)
            if DROWS == "add":
                tl.atomic_add(drow_ptrs + offs_c, drows, mask=mask, sem="relaxed")
            else:
                tl.store(drow_ptrs + offs_c, drows.to(drows_ptr.dtype.element_ty), mask=mask)
            dq = keep * dnext + tl.sum(ds[:, None] * rows, 0)
            tl.debug_barrier()  # until every thread has read what changes
            tl.store(q_row + offs_c, dq, mask=offs_c < key_dim)
        tl.debug_barrier()

    for start_c in range(0, key_dim, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        dq = tl.load(states_ptr + offs_c, mask=offs_c < key_dim)
        dq = dq.to(dquery_ptr.dtype.element_ty)
        tl.store(dquery_ptr + example * key_dim + offs_c, dq, mask=offs_c < key_dim)


@functools.cache
def _config(key_dim: int, vector: int, topk: int) -> dict:
    block_j = triton.next_power_of_2(topk)
    block_c = min(triton.next_power_of_2(key_dim), 2048 // block_j)
    return dict(
        VECTOR=vector,
        BLOCK_J=block_j,
        BLOCK_C=block_c,
        num_warps=max(block_j * block_c // 512, 1),
        maxnreg=255,  # without it ptxas spills a few to fit more programs on a multiprocessor
    )


class TapeGradient(NamedTuple):
    """The gradient of the tape that an example's reads were merged into."""

    dtape: Tensor
    """(rows, dim), as `with_dense_rows` returns it; the first key_dim features are the keys'."""
    weights: Tensor
    """(batch, num_tape_tokens, topk), contiguous, what the entries were merged with."""
    offsets: Tensor
    """(batch + 1,) int32, where the rows of each example begin."""


def key_gradients(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
    drows: Tensor,
    mode: str,
    tape: TapeGradient | None = None,
) -> Tensor:
    """Write the gradients of the rows that were read into `drows`, and return the queries'.

    Args:
        query, keys, dweights, dponder, indices, counts, average_query, loss_type: as in the op
            `tape_select_bwd`, but that a row of keys may have further features behind those of the
            key. An example reads no entry of its own bank twice.
        drows: where the gradients go, (batch, bank_size, key_dim or more) if they are stored,
            (bank_size, key_dim) float32 if they are added, (reads, key_dim) float32 if listed.
        mode: "store", "add" or "list", as the kernel has it.
        tape: what else the gradients of stored rows consist of. Where keys have all features of
            the rows, what it adds to `dweights` is added here.

    Returns:
        (batch, key_dim), dtype of query.
    """
    _, num_tape_tokens, topk = indices.shape
    (batch, key_dim), bank_size = query.shape, keys.shape[-2]
    dtape = weights = offsets = None
    num_rows = stride_tr = 0
    whole_rows = False
    if tape is None:
        vector = elements_per_access(keys, query, drows)
    else:
        dtape, weights, offsets = tape
        vector = elements_per_access(keys, query, drows, dtape)
        num_rows, dim = dtape.shape
        stride_tr = dtape.stride(0) // vector
        whole_rows = key_dim == dim
    query, keys = with_dense_rows(query), with_dense_rows(keys, vector)
    stride_kb, stride_km = bank_strides(keys, vector)
    dquery = query.new_empty(batch, key_dim)
    launch(
        _tape_select_bwd_kernel,
        (batch,),
        query_ptr=query,
        keys_ptr=keys,
        dweights_ptr=dweights.contiguous(),
        dponder_ptr=dponder.contiguous(),
        indices_ptr=indices.contiguous(),
        counts_ptr=counts.contiguous(),
        states_ptr=query.new_empty(batch, num_tape_tokens + 1, key_dim, dtype=torch.float32),
        dquery_ptr=dquery,
        drows_ptr=drows,
        dtape_ptr=dtape,
        weights_ptr=weights,
        offsets_ptr=offsets,
        bank_size=bank_size,
        key_dim=key_dim // vector,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        scale=key_dim**-0.5,
        stride_qb=query.stride(0),
        stride_kb=stride_kb,
        stride_km=stride_km,
        stride_dr=drows.stride(-2) // vector,
        stride_tr=stride_tr,
        num_rows=num_rows,
        AVERAGE_QUERY=average_query,
        ENTROPY=loss_type == "entropy",
        DROWS=mode,
        WHOLE_ROWS=whole_rows,
        **_config(key_dim, vector, topk),
    )
    return dquery
