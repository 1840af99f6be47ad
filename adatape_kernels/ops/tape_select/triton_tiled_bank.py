"""`tape_select` in Triton where examples share a bank, or a bank is too long for one program.

There are three kernels and 2 · num_tape_tokens + 1 launches: one that prepares, then for each tape
token one that scores and one that merges. A tape token needs the query that the one before has
left, and only the end of a launch makes all multiprocessors wait for one another on every card.
(Clusters would do so within a launch, on 9.0 and later alone.)

- Scoring: a program takes a tile of the bank and BLOCK_B examples, and lists the `topk` best
  entries of the tile for each of them. 10,000 entries make 79 tiles, so 64 examples are 316
  programs and 256 are 1,264, where 132 multiprocessors wait for work.
- Merging: a program takes an example and walks down the tiles' lists, which are sorted; then it
  weighs what it found, and moves the query.

In the sixteen-bit dtypes tensor cores multiply: the query in three parts, each of the keys' dtype,
whose products with a key are exact and are added up in float32. Keys in float32 would have to be
split too, six products of bfloat16 for one and three numbers for each that is loaded; their
products by multiply-adds are 3.3 GFLOP for 256 examples, 10,000 entries of 64 features and ten tape
tokens, 49 µs at an H200's 67 TFLOP/s, beside 21 launches of 2 µs. So float32 stays with
multiply-adds.
"""

import functools

import torch
from torch import Tensor

from adatape_kernels.ops.device_facts import facts_of
from adatape_kernels.ops.tape_select.outputs import SelectOutputs
from adatape_kernels.ops.tape_select.triton_primitives import (
    entry_of,
    score_of,
)
from adatape_kernels.ops.tape_select.triton_tile_scores import _tape_select_fwd_score_kernel
from adatape_kernels.ops.triton_reading import softmax
from adatape_kernels.ops.triton_runtime import launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import bank_strides, compiled_for


@compiled_for(aligned=("query_ptr", "q_ptr", "unread_ptr", "indices_ptr", "weights_ptr"))
def _tape_select_fwd_prepare_kernel(
    query_ptr,
    read_mask_ptr,
    bank_lens_ptr,
    q_ptr,
    unread_ptr,
    left_ptr,
    halting_ptr,
    indices_ptr,
    weights_ptr,
    ponder_ptr,
    counts_ptr,
    bank_size,
    key_dim,
    num_tape_tokens,
    topk,
    halt_threshold,
    stride_qb,
    BLOCK: tl.constexpr,
):
    """Make the state of an example before its first tape token, and results without any.

    `left_ptr` (batch,) holds how many entries can still be read while the example reads, then -1.
    """
    example = tl.program_id(0).to(tl.int64)
    for start in range(0, key_dim, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        query = tl.load(query_ptr + example * stride_qb + offs, mask=offs < key_dim)
        tl.store(q_ptr + example * key_dim + offs, query.to(tl.float32), mask=offs < key_dim)
    valid = bank_size
    if bank_lens_ptr is not None:
        valid = tl.minimum(tl.load(bank_lens_ptr + example), bank_size).to(tl.int32)
    left = 0
    for start in range(0, bank_size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        readable = offs < valid
        if read_mask_ptr is not None:
            read = tl.load(read_mask_ptr + example * bank_size + offs, mask=readable, other=1)
            readable &= read == 0
        unread = readable.to(tl.int8)
        tl.store(unread_ptr + example * bank_size + offs, unread, mask=offs < bank_size)
        left += tl.sum(readable.to(tl.int32), 0)
    for start in range(0, num_tape_tokens * topk, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        out, mask = example * num_tape_tokens * topk + offs, offs < num_tape_tokens * topk
        tl.store(indices_ptr + out, tl.full((BLOCK,), -1, tl.int32), mask=mask)
        tl.store(weights_ptr + out, tl.zeros((BLOCK,), tl.float32), mask=mask)
    reads = (halt_threshold > 0.0) & (left >= topk)
    tl.store(left_ptr + example, tl.where(reads, left, -1))
    tl.store(halting_ptr + example, 0.0)
    tl.store(ponder_ptr + example, 0.0)
    tl.store(counts_ptr + example, 0)


@compiled_for(aligned=("q_ptr", "keys_ptr", "lists_ptr"))
def _tape_select_fwd_merge_kernel(
    q_ptr,
    keys_ptr,
    unread_ptr,
    left_ptr,
    halting_ptr,
    lists_ptr,
    weights_ptr,
    ponder_ptr,
    indices_ptr,
    counts_ptr,
    bank_size,
    key_dim,
    num_tape_tokens,
    topk,
    tiles,
    halt_threshold,
    scale,
    stride_kb,
    stride_km,
    AVERAGE_QUERY: tl.constexpr,
    ENTROPY: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tape token of one example, from the lists of all tiles."""
    key_dim *= VECTOR  # so that the compiler sees whole vectors
    example = tl.program_id(0).to(tl.int64)
    left = tl.load(left_ptr + example)
    if left >= 0:
        offs_t, offs_j = tl.arange(0, NUM_TILES), tl.arange(0, BLOCK_J)
        mask_j = offs_j < topk
        list_rows = lists_ptr + (example * tiles + offs_t) * topk
        place = tl.zeros((NUM_TILES,), tl.int32)  # the next of each list
        heads = tl.load(list_rows, mask=offs_t < tiles, other=-0x7FFFFFFFFFFFFFFF)
        chosen = tl.zeros((BLOCK_J,), tl.int64)
        for j in range(topk):
            best = tl.max(heads, 0)
            taken = (heads == best) & (offs_t < tiles)
            place += taken.to(tl.int32)
            following = tl.load(
                list_rows + place, mask=taken & (place < topk), other=-0x7FFFFFFFFFFFFFFF
            )
            heads = tl.where(taken, following, heads)
            chosen = tl.where(offs_j == j, best, chosen)

        weights = softmax(score_of(chosen) * scale, mask_j)
        first = tl.sum(tl.where(offs_j == 0, weights, 0.0), 0)  # the best one weighs most
        count = tl.load(counts_ptr + example)
        out = (example * num_tape_tokens + count) * topk + offs_j
        tl.store(indices_ptr + out, entry_of(chosen), mask=mask_j)
        tl.store(weights_ptr + out, weights, mask=mask_j)
        unread = unread_ptr + example * bank_size + entry_of(chosen)
        tl.store(unread, tl.zeros((BLOCK_J,), tl.int8), mask=mask_j)
        key_rows = keys_ptr + example * stride_kb * VECTOR
        key_rows += entry_of(chosen).to(tl.int64) * stride_km * VECTOR
        q_row = q_ptr + example * key_dim
        for start_c in range(0, key_dim, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < key_dim
            rows = tl.load(key_rows[:, None] + offs_c, mask=mask_j[:, None] & mask_c, other=0.0)
            q = tl.sum(weights[:, None] * rows.to(tl.float32), 0)
            if AVERAGE_QUERY:
                q = (tl.load(q_row + offs_c, mask=mask_c, other=0.0) + q) * 0.5
            tl.debug_barrier()  # until every thread has read what changes
            tl.store(q_row + offs_c, q, mask=mask_c)

        cost = 1.0 - (tl.sum(weights * weights, 0) if ENTROPY else first)
        ponder = tl.load(ponder_ptr + example) + cost
        halting = tl.load(halting_ptr + example) + first
        left -= topk
        tl.debug_barrier()
        reads_on = (halting < halt_threshold) & (left >= topk)
        tl.store(ponder_ptr + example, ponder)
        tl.store(halting_ptr + example, halting)
        tl.store(counts_ptr + example, count + 1)
        tl.store(left_ptr + example, tl.where(reads_on, left, -1))


@functools.lru_cache(maxsize=4096)
def tiled_bank_config(
    dtype: torch.dtype, shape: torch.Size, topk: int, capability: tuple[int, int]
) -> dict:
    """Tile sizes and warps for keys of this shape; how a score is summed depends on no batch.

    A long key meets 64 examples at a time, so that all keys come from the L2 cache four times for
    256 examples, and not sixteen times.
    """
    bank_size, key_dim = shape[-2:]
    shared, split = len(shape) == 2, dtype != torch.float32 and len(shape) == 2
    vector, width = 16 // dtype.itemsize, triton.next_power_of_2(key_dim)
    if shared:
        block_b = 64 if key_dim > 128 and split else 16
        block_m, num_warps = 128, 8 if block_b == 64 else 4
        block_k = min(max(width, 16), 32) if split else 16
        # The parts of 32 features of a query in float16 take four registers more than there are
        # for four programs a multiprocessor, in code for these. Its own loads are narrower so.
        if dtype == torch.float16 and block_b == 16 and capability in ((8, 0), (10, 0)):
            block_k = 16
    else:
        block_b, block_m, num_warps = 1, 256, 8
        block_k = min(max(width, vector), 4 * vector)
    block_j = triton.next_power_of_2(topk)
    return dict(
        SPLIT=split,
        VECTOR=vector,
        NUM_TILES=max(triton.next_power_of_2(num_blocks(bank_size, block_m)), 32),
        BLOCK_B=block_b,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_J=block_j,
        BLOCK_C=min(width, max(1024 // block_j, 8)),
        num_warps=num_warps,
        num_stages=3,
        maxnreg=255 if block_b == 64 else 168 if shared and not split else 128,
    )


def select_from_tiles(
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
    """Launch the kernels; those of an example that has halted return at once."""
    (batch, key_dim), bank_size = query.shape, keys.shape[-2]
    _, num_tape_tokens, topk = outputs.weights.shape
    capability = facts_of(keys.device).capability
    config = tiled_bank_config(keys.dtype, keys.shape, topk, capability)
    tiles, vector = num_blocks(bank_size, config["BLOCK_M"]), config["VECTOR"]
    stride_kb, stride_km = bank_strides(keys, vector)
    bank = dict(
        bank_size=bank_size,
        key_dim=key_dim // vector,
        topk=topk,
        tiles=tiles,
        stride_kb=stride_kb,
        stride_km=stride_km,
        VECTOR=vector,
    )
    results = dict(
        weights_ptr=outputs.weights,
        ponder_ptr=outputs.ponder,
        indices_ptr=outputs.indices,
        counts_ptr=outputs.counts,
    )
    q = query.new_empty(batch, key_dim, dtype=torch.float32)
    unread = query.new_empty(batch, bank_size, dtype=torch.int8)
    left = query.new_empty(batch, dtype=torch.int32)
    halting = query.new_empty(batch, dtype=torch.float32)
    lists = query.new_empty(batch, tiles, topk, dtype=torch.int64)
    launch(
        _tape_select_fwd_prepare_kernel,
        (batch,),
        query_ptr=query,
        read_mask_ptr=read_mask,
        bank_lens_ptr=bank_lens,
        q_ptr=q,
        unread_ptr=unread,
        left_ptr=left,
        halting_ptr=halting,
        **results,
        bank_size=bank_size,
        key_dim=key_dim,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        stride_qb=query.stride(0),
        BLOCK=1024,
        num_warps=4,
    )
    scoring = {name: config[name] for name in ("SPLIT", "BLOCK_B", "BLOCK_M", "BLOCK_K")}
    merging = {name: config[name] for name in ("NUM_TILES", "BLOCK_J", "BLOCK_C")}
    for _ in range(num_tape_tokens):
        launch(
            _tape_select_fwd_score_kernel,
            (tiles * num_blocks(batch, config["BLOCK_B"]),),
            q_ptr=q,
            keys_ptr=keys,
            unread_ptr=unread,
            left_ptr=left,
            lists_ptr=lists,
            batch=batch,
            **bank,
            **scoring,
            SHARED=keys.dim() == 2,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            maxnreg=config["maxnreg"],
        )
        launch(
            _tape_select_fwd_merge_kernel,
            (batch,),
            q_ptr=q,
            keys_ptr=keys,
            unread_ptr=unread,
            left_ptr=left,
            halting_ptr=halting,
            lists_ptr=lists,
            **results,
            **bank,
            **merging,
            num_tape_tokens=num_tape_tokens,
            halt_threshold=halt_threshold,
            scale=scale,
            AVERAGE_QUERY=average_query,
            ENTROPY=entropy,
            num_warps=4,
            maxnreg=128,
        )
