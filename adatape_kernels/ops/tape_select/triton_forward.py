"""`tape_select` in Triton: all steps of an example in one launch, its queries in a scratch."""

import functools

import torch
from torch import Tensor

from adatape_kernels.op_types import LossType
from adatape_kernels.ops.tape_select.outputs import SelectOutputs, empty_outputs
from adatape_kernels.ops.triton_reading import softmax
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import (
    bank_strides,
    compiled_for,
    in_whole_accesses,
)


@triton.jit
def _ordered(scores, readable):
    """Integers in the order of the scores: NaN below every number, the unreadable below NaN."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(scores == scores, order, -0x7FFFFFFF)
    return tl.where(readable, order, -0x80000000)


@triton.jit
def _ranked(order, entries):
    """int64 whose maximum is the best order, and among equals the lowest entry."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - entries)


@triton.jit
def _entry(ranked):
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _score(ranked):
    order = (ranked >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_parts(x):
    """Three addends of x that bfloat16 holds exactly, 8 of its 24 bits each; NaN stays NaN."""
    first = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    rest = x - first
    second = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, first, x), second, rest - second


@triton.jit
def _scores(
    q,
    q_rows,
    key_rows,
    mask_b,
    mask_m,
    key_dim,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE_KEY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q · key in float32, (BLOCK_B, BLOCK_M); equal rows get equal bits wherever they stand.

    `q` is the query if a block holds the WHOLE_KEY; a longer one is loaded from `q_rows`.
    """
    high = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    low = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    for start_k in range(0, BLOCK_K if WHOLE_KEY else key_dim, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < key_dim
        if not WHOLE_KEY:
            q = tl.load(q_rows + offs_k, mask=mask_b[:, None] & mask_k, other=0.0)
        if SHARED:
            mask = mask_m & mask_k[:, None]
            key = tl.load(key_rows + offs_k[:, None], mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
            if SPLIT:
                first, second, third = _bf16_parts(q)
                high = tl.dot(first.to(key.dtype), key, high, input_precision="ieee")
                low = tl.dot(third.to(key.dtype), key, low, input_precision="ieee")
                low = tl.dot(second.to(key.dtype), key, low, input_precision="ieee")
            else:
                high = tl.dot(q, key.to(tl.float32), high, input_precision="ieee")
        else:
            mask = mask_m[:, None] & mask_k
            key = tl.load(key_rows[:, None] + offs_k, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_K)
            high += tl.sum(key.to(tl.float32) * q, 1)[None, :]
    # An infinite key times a part that is zero is NaN, where q · key is infinite.
    return tl.where(tl.abs(high) < float("inf"), high + low, high)


@compiled_for(aligned=("query_ptr", "keys_ptr", "q_ptr", "order_ptr"))
def _tape_select_fwd_kernel(
    query_ptr,
    keys_ptr,
    read_mask_ptr,
    bank_lens_ptr,
    q_ptr,
    order_ptr,
    weights_ptr,
    ponder_ptr,
    indices_ptr,
    counts_ptr,
    batch,
    bank_size,
    key_dim,
    num_tape_tokens,
    topk,
    halt_threshold,
    scale,
    stride_qb,
    stride_kb,
    stride_km,
    AVERAGE_QUERY: tl.constexpr,
    ENTROPY: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE_KEY: tl.constexpr,
    NUM_TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All steps of BLOCK_B examples: one that has its own bank, or several that share theirs.

    A bank of one tile keeps its entries' orders in registers. A larger one keeps them in the
    scratch `order_ptr` (batch, NUM_TILES · BLOCK_M), and in registers the best order of each tile,
    so that the next best entry is looked for in one tile only. The query stands in the scratch
    `q_ptr` (batch, key_dim), in float32.

    Every step scores by a pass over the keys. Updating the scores by the merged rows of the keys'
    Gram matrix costs more: an own bank's rows are products of topk · bank_size · key_dim against
    the pass's bank_size · key_dim, or all of them bank_size² · key_dim against num_tape_tokens
    passes; a shared bank's pay only for batch · num_tape_tokens > bank_size, and take 400 MB at
    10,000 entries.
    """
    key_dim *= VECTOR  # so that the compiler sees whole vectors
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_t = tl.arange(0, NUM_TILES)
    offs_m = tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, BLOCK_J)
    mask_b, mask_j = offs_b < batch, offs_j < topk
    rows_b = offs_b.to(tl.int64)
    q_rows = q_ptr + rows_b[:, None] * key_dim
    order_rows = order_ptr + rows_b[:, None] * (NUM_TILES * BLOCK_M)
    out_rows = rows_b[:, None] * num_tape_tokens
    mask_out = mask_b[:, None] & mask_j

    for start_c in range(0, key_dim, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask_c = mask_b[:, None] & (offs_c < key_dim)
        query = tl.load(query_ptr + rows_b[:, None] * stride_qb + offs_c, mask=mask_c)
        tl.store(q_rows + offs_c, query.to(tl.float32), mask=mask_c)
    bank_lens = tl.full((BLOCK_B,), 0, tl.int32) + bank_size
    if bank_lens_ptr is not None:
        bank_lens = tl.minimum(tl.load(bank_lens_ptr + offs_b, mask=mask_b, other=0), bank_size)
    order = tl.zeros((BLOCK_B, BLOCK_M), tl.int32)
    best_of_tiles = tl.full((BLOCK_B, NUM_TILES), -0x80000000, tl.int32)
    available = tl.zeros((BLOCK_B,), tl.int32)
    for start_m in range(0, bank_size, BLOCK_M):
        entries = start_m + offs_m
        mask = mask_b[:, None] & (entries < bank_size)
        readable = mask & (entries < bank_lens[:, None])
        if read_mask_ptr is not None:
            offsets = rows_b[:, None] * bank_size + entries
            readable &= tl.load(read_mask_ptr + offsets, mask=mask, other=1) == 0
        available += tl.sum(readable.to(tl.int32), 1)
        order = tl.where(readable, 0, -0x80000000)
        if NUM_TILES > 1:
            tl.store(order_rows + entries, order, mask=mask_b[:, None])
    tl.debug_barrier()

    step = 0
    halting = tl.zeros((BLOCK_B,), tl.float32)
    ponder = tl.zeros((BLOCK_B,), tl.float32)
    counts = tl.zeros((BLOCK_B,), tl.int32)
    reading = mask_b & (halting < halt_threshold) & (available >= topk) & (num_tape_tokens > 0)
    while tl.max(reading.to(tl.int32), 0) > 0:
        offs_k = tl.arange(0, BLOCK_K)
        q = tl.load(q_rows + offs_k, mask=mask_b[:, None] & (offs_k < key_dim), other=0.0)
        for start_m in range(0, bank_size, BLOCK_M):
            entries = start_m + offs_m
            mask_m = entries < bank_size
            key_rows = keys_ptr + entries.to(tl.int64) * stride_km * VECTOR
            if not SHARED:
                key_rows += rows_b * stride_kb * VECTOR
            scores = _scores(
                q,
                q_rows,
                key_rows,
                mask_b,
                mask_m,
                key_dim,
                SHARED,
                SPLIT,
                WHOLE_KEY,
                BLOCK_B,
                BLOCK_M,
                BLOCK_K,
            )
            if NUM_TILES > 1:
                order = tl.load(order_rows + entries, mask=mask_b[:, None], other=-0x80000000)
            order = _ordered(scores, order != -0x80000000)  # what was read stays unreadable
            if NUM_TILES > 1:
                tl.store(order_rows + entries, order, mask=mask_b[:, None])
                best = tl.max(order, 1)[:, None]
                best_of_tiles = tl.where(offs_t == start_m // BLOCK_M, best, best_of_tiles)
        tl.debug_barrier()

        chosen = tl.zeros((BLOCK_B, BLOCK_J), tl.int64)
        for j in range(topk):
            entries = offs_m[None, :]
            if NUM_TILES > 1:
                tile = _entry(tl.max(_ranked(best_of_tiles, offs_t), 1))[:, None]
                entries = tile * BLOCK_M + offs_m
                order = tl.load(order_rows + entries, mask=mask_b[:, None], other=-0x80000000)
            best = tl.max(_ranked(order, entries), 1)[:, None]
            order = tl.where(entries == _entry(best), -0x80000000, order)
            chosen = tl.where(offs_j == j, best, chosen)
            if NUM_TILES > 1:
                tl.store(order_rows + _entry(best), -0x80000000, mask=mask_b[:, None])
                best_of_tiles = tl.where(offs_t == tile, tl.max(order, 1)[:, None], best_of_tiles)
                tl.debug_barrier()

        weights = softmax(_score(chosen) * scale, mask_j[None, :])  # (BLOCK_B, BLOCK_J)
        first = tl.sum(tl.where(offs_j == 0, weights, 0.0), 1)  # the best one weighs most
        out = (out_rows + step) * topk + offs_j
        tl.store(indices_ptr + out, tl.where(reading[:, None], _entry(chosen), -1), mask=mask_out)
        tl.store(weights_ptr + out, tl.where(reading[:, None], weights, 0.0), mask=mask_out)
        key_rows = rows_b[:, None] * stride_kb + _entry(chosen).to(tl.int64) * stride_km
        key_rows = keys_ptr + key_rows * VECTOR  # (BLOCK_B, BLOCK_J)
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            mask_c = mask_b[:, None] & (offs_c < key_dim)
            mask = mask_out[:, :, None] & mask_c[:, None, :]
            rows = tl.load(key_rows[:, :, None] + offs_c, mask=mask, other=0.0)
            following = tl.sum(weights[:, :, None] * rows.to(tl.float32), 1)  # (BLOCK_B, BLOCK_C)
            if AVERAGE_QUERY:
                previous = tl.load(q_rows + offs_c, mask=mask_c, other=0.0)
                following = (previous + following) * 0.5
            tl.debug_barrier()  # until every thread has read what changes
            tl.store(q_rows + offs_c, following, mask=mask_c)
        tl.debug_barrier()

        step += 1
        counts += reading.to(tl.int32)
        cost = 1.0 - (tl.sum(weights * weights, 1) if ENTROPY else first)
        ponder += tl.where(reading, cost, 0.0)
        halting += tl.where(reading, first, 0.0)
        available -= tl.where(reading, topk, 0)
        reading &= (halting < halt_threshold) & (available >= topk) & (step < num_tape_tokens)

    for unused in range(step, num_tape_tokens):
        out = (out_rows + unused) * topk + offs_j
        tl.store(indices_ptr + out, tl.full((BLOCK_B, BLOCK_J), -1, tl.int32), mask=mask_out)
        tl.store(weights_ptr + out, tl.zeros((BLOCK_B, BLOCK_J), tl.float32), mask=mask_out)
    tl.store(ponder_ptr + offs_b, ponder, mask=mask_b)
    tl.store(counts_ptr + offs_b, counts, mask=mask_b)


@functools.lru_cache(maxsize=4096)
def _config(dtype: torch.dtype, shape: torch.Size, topk: int) -> dict:
    """Tile sizes, pipeline, warps and registers of the forward kernel, for keys of this shape.

    An own bank's BLOCK_K, by which a score is summed, depends on neither the batch nor the bank's
    size, to which a batch may be padded. Without a bound on registers ptxas spills some, to fit
    more programs on a multiprocessor.
    """
    bank_size, key_dim = shape[-2:]
    split = len(shape) == 2 and dtype == torch.bfloat16
    block_j, width = triton.next_power_of_2(topk), triton.next_power_of_2(key_dim)
    if len(shape) == 3:
        block_m = min(max(triton.next_power_of_2(bank_size), 128), 1024)
        block_b, block_k, block_c = 1, 64 // dtype.itemsize, max(2048 // block_j, 8)
        launch_options = dict(num_warps=block_m // 64, num_stages=1, maxnreg=128)
    elif bank_size <= 1 << 14:
        block_m, block_k = 128, 16
        if split:
            block_k = max(width, 16) if width <= 64 else 32
        block_b, block_c = 16, min(max(256 // block_j, 8), 64)
        launch_options = dict(num_warps=8, num_stages=3, maxnreg=255)
    else:  # the best orders of hundreds of tiles leave few registers
        block_b, block_m, block_k, block_c = 16, 256, 16, 8
        launch_options = dict(num_warps=8, num_stages=3 if split else 1, maxnreg=255)
    return dict(
        SPLIT=split,
        WHOLE_KEY=block_k >= key_dim,
        VECTOR=16 // dtype.itemsize,
        NUM_TILES=triton.next_power_of_2(num_blocks(bank_size, block_m)),
        BLOCK_B=block_b,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_J=block_j,
        BLOCK_C=min(width, block_c),
        **launch_options,
    )


@kernel()
def tape_select(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: LossType,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> SelectOutputs:
    """Launch the kernel, which keeps lengths outside the bank within it."""
    scale = query.shape[1] ** -0.5
    query, keys = in_whole_accesses(query), in_whole_accesses(keys)
    (batch, key_dim), bank_size = query.shape, keys.shape[-2]
    config = _config(keys.dtype, keys.shape, topk)
    outputs = empty_outputs(query, num_tape_tokens, topk)
    tiles = config["NUM_TILES"] if config["NUM_TILES"] > 1 else 0
    strides = bank_strides(keys, config["VECTOR"])
    launch(
        _tape_select_fwd_kernel,
        (num_blocks(batch, config["BLOCK_B"]),),
        query_ptr=query,
        keys_ptr=keys,
        read_mask_ptr=None if read_mask is None else read_mask.contiguous(),
        bank_lens_ptr=None if bank_lens is None else bank_lens.contiguous(),
        q_ptr=query.new_empty(batch, key_dim, dtype=torch.float32),
        order_ptr=query.new_empty(batch, tiles * config["BLOCK_M"], dtype=torch.int32),
        weights_ptr=outputs.weights,
        ponder_ptr=outputs.ponder,
        indices_ptr=outputs.indices,
        counts_ptr=outputs.counts,
        batch=batch,
        bank_size=bank_size,
        key_dim=key_dim // config["VECTOR"],
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        scale=scale,
        stride_qb=query.stride(0),
        stride_kb=strides.example,
        stride_km=strides.entry,
        AVERAGE_QUERY=average_query,
        ENTROPY=loss_type == "entropy",
        SHARED=keys.dim() == 2,
        **config,
    )
    return outputs
