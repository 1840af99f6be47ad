"""`tape_select` in Triton where each example has a bank of its own: a program reads for an example.

A program is short of parallel work and full of waiting: each tape token needs the query that the
one before has left. So what costs is the chain of a step: a pass over the keys, `topk` maxima over
the program, and the row that they merge to. Three properties of the kernel keep it short.

- Everything is one-dimensional, and what a reduction gives is a number. Triton then has no layouts
  to convert between; of a (1, bank_size) matrix Triton 3.6 gave every thread 128 elements to look
  through at each maximum.
- Eight warps with at most 128 registers: two programs fit on a multiprocessor, which wait in turns,
  and 256 examples are one wave of 132 multiprocessors.
- In the pass no warp waits for another. A thread has up to eight loads of 16 bytes under way, so
  that two programs have 64 kB under way where memory needs 30 kB at a time.

Where do the keys come from? 784 × 64 in 16 bits are 100 kB; two such banks stay in the L1 cache of
a multiprocessor of 9.0, and one in that of 8.0. 784 × 384 are 602 kB, of 256 examples 154 MB, and
go by at every step, from memory at 32 µs a step on an H200. All multiprocessors together have 30 MB
of shared memory, so that clusters that keep their banks take five waves of ten steps, at two
latencies of a cluster a step no more than 1.5 times as fast, on 9.0 alone. The Gram form needs
784² · 384 products an example, 120 µs of tensor cores, and 629 MB of scores. So steps take turns in
direction: the one begins with the entries that the one before has left in the L2 cache, which
holds a third of 154 MB.

Tensor cores would compute the same products 16 times, because a matrix has at least eight columns
and there is one query; the pass is bound by its loads, not by its multiply-adds.
"""

import functools

import torch
from torch import Tensor

from adatape_kernels.ops.tape_select.outputs import SelectOutputs
from adatape_kernels.ops.tape_select.triton_primitives import (
    entry_of,
    ordered,
    ranked,
    score_of,
)
from adatape_kernels.ops.triton_reading import softmax
from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import bank_strides, compiled_for

MOST_ENTRIES = 2048
"""A program holds the order of so many entries in its registers."""


@triton.jit
def _score(
    keys_ptr,
    q_ptr,
    scores_ptr,
    start_m,
    q,
    bank_size,
    key_dim,
    stride_km,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store q · key of BLOCK_M entries in float32; equal rows get equal bits wherever they stand.

    A thread adds up the products of its features, chunk after chunk, and then threads their sums.
    `q` is the query if one chunk holds it.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < bank_size
    key_rows = keys_ptr + offs_m.to(tl.int64) * stride_km
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for chunk in tl.range(0, NUM_CHUNKS, loop_unroll_factor=3):
        offs_k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < key_dim
        key = tl.load(key_rows[:, None] + offs_k, mask=mask_m[:, None] & mask_k, other=0.0)
        if NUM_CHUNKS > 1:
            q = tl.load(q_ptr + offs_k, mask=mask_k, other=0.0)
        products += key.to(tl.float32) * q
    tl.store(scores_ptr + offs_m, tl.sum(products, 1), mask=mask_m)


@compiled_for(aligned=("query_ptr", "keys_ptr", "q_ptr", "scores_ptr"))
def _tape_select_fwd_own_kernel(
    query_ptr,
    keys_ptr,
    read_mask_ptr,
    bank_lens_ptr,
    q_ptr,
    scores_ptr,
    weights_ptr,
    ponder_ptr,
    indices_ptr,
    counts_ptr,
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
    VECTOR: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All steps of one example, whose query and scores stand in the scratches of those names."""
    key_dim *= VECTOR  # so that the compiler sees whole vectors
    stride_km *= VECTOR
    example = tl.program_id(0).to(tl.int64)
    query_ptr += example * stride_qb
    keys_ptr += example * stride_kb * VECTOR
    q_ptr += example * key_dim
    scores_ptr += example * BLOCK_ALL
    entries = tl.arange(0, BLOCK_ALL)
    offs_j = tl.arange(0, BLOCK_J)
    offs_k = tl.arange(0, BLOCK_K)
    mask_j = offs_j < topk

    for start_c in range(0, key_dim, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        query = tl.load(query_ptr + offs_c, mask=offs_c < key_dim)
        tl.store(q_ptr + offs_c, query.to(tl.float32), mask=offs_c < key_dim)
    readable = entries < bank_size
    if bank_lens_ptr is not None:
        readable &= entries < tl.load(bank_lens_ptr + example)
    if read_mask_ptr is not None:
        read = tl.load(read_mask_ptr + example * bank_size + entries, mask=readable, other=1)
        readable &= read == 0
    available = tl.sum(readable.to(tl.int32), 0)
    tl.debug_barrier()

    step = 0
    halting = 0.0
    ponder = 0.0
    out = example * num_tape_tokens * topk + offs_j
    tiles = tl.cdiv(bank_size, BLOCK_M)
    while (halting < halt_threshold) & (available >= topk) & (step < num_tape_tokens):
        q = tl.load(q_ptr + offs_k, mask=offs_k < key_dim, other=0.0)
        for i in range(tiles):
            tile = i if step % 2 == 0 else tiles - 1 - i
            _score(
                keys_ptr,
                q_ptr,
                scores_ptr,
                tile * BLOCK_M,
                q,
                bank_size,
                key_dim,
                stride_km,
                NUM_CHUNKS,
                BLOCK_M,
                BLOCK_K,
            )
        tl.debug_barrier()
        scores = tl.load(scores_ptr + entries)  # those of the unreadable are not looked at
        order = ordered(scores, readable)
        chosen = tl.zeros((BLOCK_J,), tl.int64)
        for j in range(topk):
            best = tl.max(ranked(order, entries), 0)
            order = tl.where(entries == entry_of(best), -0x80000000, order)
            chosen = tl.where(offs_j == j, best, chosen)
        readable = order != -0x80000000

        weights = softmax(score_of(chosen) * scale, mask_j)
        first = tl.sum(tl.where(offs_j == 0, weights, 0.0), 0)  # the best one weighs most
        tl.store(indices_ptr + out, entry_of(chosen), mask=mask_j)
        tl.store(weights_ptr + out, weights, mask=mask_j)
        key_rows = keys_ptr + entry_of(chosen).to(tl.int64) * stride_km
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < key_dim
            rows = tl.load(key_rows[:, None] + offs_c, mask=mask_j[:, None] & mask_c, other=0.0)
            following = tl.sum(weights[:, None] * rows.to(tl.float32), 0)
            if AVERAGE_QUERY:
                following = (tl.load(q_ptr + offs_c, mask=mask_c, other=0.0) + following) * 0.5
            tl.debug_barrier()  # until every thread has read what changes
            tl.store(q_ptr + offs_c, following, mask=mask_c)
        tl.debug_barrier()

        ponder += 1.0 - (tl.sum(weights * weights, 0) if ENTROPY else first)
        halting += first
        available -= topk
        step += 1
        out += topk

    for _ in range(step, num_tape_tokens):
        tl.store(indices_ptr + out, tl.full((BLOCK_J,), -1, tl.int32), mask=mask_j)
        tl.store(weights_ptr + out, tl.zeros((BLOCK_J,), tl.float32), mask=mask_j)
        out += topk
    tl.store(ponder_ptr + example, ponder)
    tl.store(counts_ptr + example, step)


@functools.lru_cache(maxsize=4096)
def own_bank_config(dtype: torch.dtype, bank_size: int, key_dim: int, topk: int) -> dict:
    """Tile sizes and launch options for banks of this size.

    How a score is summed, which BLOCK_K and NUM_CHUNKS decide, depends on neither the batch nor the
    bank's size, to which a batch may be padded.
    """
    vector, width = 16 // dtype.itemsize, triton.next_power_of_2(key_dim)
    block_k = min(max(width, vector), 16 * vector)
    block_all = max(triton.next_power_of_2(bank_size), 32)
    # A warp has whole rows, and a thread up to eight accesses of 16 bytes at a time.
    rows_of_warp = 32 * vector // block_k
    num_warps = max(min(block_all // 32, 8), 1)
    block_j = triton.next_power_of_2(topk)
    return dict(
        VECTOR=vector,
        NUM_CHUNKS=num_blocks(key_dim, block_k),
        BLOCK_ALL=block_all,
        BLOCK_M=num_warps * rows_of_warp * (4 if key_dim <= block_k else 2),
        BLOCK_K=block_k,
        BLOCK_J=block_j,
        BLOCK_C=min(width, max(2048 // block_j, 8)),
        num_warps=num_warps,
        num_stages=1,
        maxnreg=128,
    )


def select_from_own_banks(
    query: Tensor,
    keys: Tensor,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
    outputs: SelectOutputs,
    halt_threshold: float,
    scale: float,
    average_query: bool,
    entropy: bool,
) -> None:
    """Launch the kernel."""
    (batch, key_dim), bank_size = query.shape, keys.shape[-2]
    _, num_tape_tokens, topk = outputs.weights.shape
    config = own_bank_config(keys.dtype, bank_size, key_dim, topk)
    stride_kb, stride_km = bank_strides(keys, config["VECTOR"])
    launch(
        _tape_select_fwd_own_kernel,
        (batch,),
        query_ptr=query,
        keys_ptr=keys,
        read_mask_ptr=read_mask,
        bank_lens_ptr=bank_lens,
        q_ptr=query.new_empty(batch, key_dim, dtype=torch.float32),
        scores_ptr=query.new_empty(batch, config["BLOCK_ALL"], dtype=torch.float32),
        weights_ptr=outputs.weights,
        ponder_ptr=outputs.ponder,
        indices_ptr=outputs.indices,
        counts_ptr=outputs.counts,
        bank_size=bank_size,
        key_dim=key_dim // config["VECTOR"],
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        scale=scale,
        stride_qb=query.stride(0),
        stride_kb=stride_kb,
        stride_km=stride_km,
        AVERAGE_QUERY=average_query,
        ENTROPY=entropy,
        **config,
    )
