"""Adaptive tape reading: which bank tokens an example reads, and when it stops (SPEC 3).

while h < τ:   w = softmax(topk(q · keyᵀ) / √K)   h += w_0   p += 1 - Σ w²   q ← (q + Σ w key) / 2
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels._triton import in_vectors, launch, tl, triton
from adatape_kernels.backend import (
    define_autograd,
    define_op,
    register,
    register_compiled,
    register_triton,
)
from adatape_kernels.ops.tape_select_bwd import bank_strides, softmax, triton_tape_select_bwd
from adatape_kernels.reference import LossType, TapeSelection, wide_dtype

MAX_TOPK = 32


def tape_select(
    query: Tensor,
    keys: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool = True,
    loss_type: LossType = "entropy",
    read_mask: Tensor | None = None,
    bank_lens: Tensor | None = None,
) -> TapeSelection:
    """Read bank entries for each example until its halting score reaches the threshold.

    Args:
        query: (batch, key_dim); float32, float16, bfloat16 or float64; already normalised.
        keys: (bank_size, key_dim), shared, or (batch, bank_size, key_dim); dtype of query.
        num_tape_tokens: most tape tokens an example may read.
        topk: bank entries merged into one tape token, 1 to 32.
        halt_threshold: an example reads on while its halting score is below this.
        average_query: the next query is the mean of the query and the merged key, not the latter.
        loss_type: what a step adds to the ponder loss: "entropy" 1 - Σ w², "max" 1 - max w.
        read_mask: (batch, bank_size) bool, True where an entry counts as read from the start.
        bank_lens: (batch,) integers; entries of an example's bank from there on do not exist.

    Returns:
        TapeSelection(indices, weights, counts, ponder): (batch, num_tape_tokens, topk) int32, -1
        where unread; the same shape in float32, 0 where unread; (batch,) int32; (batch,) float32.
        Float64 input gives float64 weights and ponder. Equal scores go to the lower index; NaN
        ranks below every number; an index is always inside the example's bank.

    Raises:
        ValueError: a shape, dtype, device or value differs from the above, or bank_size < topk.

    Differentiable in query and keys, through weights and ponder.

    Source: SPEC 3; scenic adatape/layers.py, ACTFunction.act_step.
    """
    check_arguments(
        query, keys, num_tape_tokens, topk, halt_threshold, loss_type, read_mask, bank_lens
    )
    options = (num_tape_tokens, topk, float(halt_threshold), average_query, loss_type)
    weights, ponder, indices, counts = _tape_select(query, keys, *options, read_mask, bank_lens)
    return TapeSelection(indices, weights, counts, ponder)


def check_arguments(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    loss_type: str,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
    name: str = "keys",
) -> None:
    """Raise ValueError, as `tape_select` says, where `keys` has the name of what they come from."""
    shape, keys_shape, dtype = query.shape, keys.shape, query.dtype
    if len(shape) != 2 or not dtype.is_floating_point or shape[1] == 0:
        raise ValueError(
            "query: expected floating-point (batch, key_dim), key_dim at least 1, "
            f"got {dtype} {tuple(shape)}"
        )
    batch, key_dim = shape
    if len(keys_shape) not in (2, 3) or keys_shape[-1] != key_dim:
        raise ValueError(
            f"{name}: expected ([batch,] bank_size, {key_dim}), got {tuple(keys_shape)}"
        )
    if len(keys_shape) == 3 and keys_shape[0] != batch:
        raise ValueError(f"{name}: expected batch {batch} like query, got {tuple(keys_shape)}")
    if keys.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} like query, got {keys.dtype}")
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk: expected 1 to {MAX_TOPK}, got {topk}")
    bank_size = keys_shape[-2]
    if bank_size < topk:
        raise ValueError(f"{name}: expected at least topk = {topk} bank entries, got {bank_size}")
    if num_tape_tokens < 0:
        raise ValueError(f"num_tape_tokens: expected 0 or more, got {num_tape_tokens}")
    if halt_threshold != halt_threshold:
        raise ValueError(f"halt_threshold: expected a number, got {halt_threshold}")
    if loss_type not in ("entropy", "max"):
        raise ValueError(f"loss_type: expected 'entropy' or 'max', got {loss_type!r}")
    if read_mask is not None and (
        read_mask.dtype != torch.bool or read_mask.shape != (batch, bank_size)
    ):
        raise ValueError(
            f"read_mask: expected bool ({batch}, {bank_size}), "
            f"got {read_mask.dtype} {tuple(read_mask.shape)}"
        )
    if bank_lens is not None and (
        bank_lens.dtype not in (torch.int32, torch.int64) or bank_lens.shape != (batch,)
    ):
        raise ValueError(
            f"bank_lens: expected int32 or int64 ({batch},), "
            f"got {bank_lens.dtype} {tuple(bank_lens.shape)}"
        )
    device = query.device
    for argument, tensor in ((name, keys), ("read_mask", read_mask), ("bank_lens", bank_lens)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{argument}: expected a tensor on {device}, got {tensor.device}")


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
    q, q_rows, key_rows, mask_b, mask_m, key_dim, SHARED: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE_KEY: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _tape_select_fwd_kernel(
    query_ptr, keys_ptr, read_mask_ptr, bank_lens_ptr, q_ptr, order_ptr,
    weights_ptr, ponder_ptr, indices_ptr, counts_ptr,
    batch, bank_size, key_dim, num_tape_tokens, topk, halt_threshold, scale,
    stride_qb, stride_kb, stride_km,
    AVERAGE_QUERY: tl.constexpr, ENTROPY: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE_KEY: tl.constexpr, NUM_TILES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
                q, q_rows, key_rows, mask_b, mask_m, key_dim,
                SHARED, SPLIT, WHOLE_KEY, BLOCK_B, BLOCK_M, BLOCK_K,
            )  # fmt: skip
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


def _fwd_config(keys: Tensor, topk: int) -> dict:
    """Tile sizes, pipeline, warps and registers of the forward kernel.

    An own bank's BLOCK_K, by which a score is summed, depends on neither the batch nor the bank's
    size, to which a batch may be padded. Without a bound on registers ptxas spills some, to fit
    more programs on a multiprocessor.
    """
    bank_size, key_dim = keys.shape[-2:]
    split = keys.dim() == 2 and keys.dtype == torch.bfloat16
    block_j, width = triton.next_power_of_2(topk), triton.next_power_of_2(key_dim)
    if keys.dim() == 3:
        block_m = min(max(triton.next_power_of_2(bank_size), 128), 1024)
        block_b, block_k, block_c = 1, 64 // keys.itemsize, max(2048 // block_j, 8)
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
        SPLIT=split, WHOLE_KEY=block_k >= key_dim, VECTOR=16 // keys.itemsize,
        NUM_TILES=triton.next_power_of_2(triton.cdiv(bank_size, block_m)),
        BLOCK_B=block_b, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_J=block_j,
        BLOCK_C=min(width, block_c), **launch_options,
    )  # fmt: skip


def _fake(
    query: Tensor, keys: Tensor, num_tape_tokens: int, topk: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, wide = query.shape[0], wide_dtype(query.dtype)
    return (
        query.new_empty(batch, num_tape_tokens, topk, dtype=wide),
        query.new_empty(batch, dtype=wide),
        query.new_empty(batch, num_tape_tokens, topk, dtype=torch.int32),
        query.new_empty(batch, dtype=torch.int32),
    )


def _fake_bwd(
    query: Tensor, keys: Tensor, dweights: Tensor, dponder: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


_tape_select = define_op(
    "tape_select(Tensor query, Tensor keys, SymInt num_tape_tokens, SymInt topk, "
    "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
    "Tensor? bank_lens) -> (Tensor weights, Tensor ponder, Tensor indices, Tensor counts)",
    _fake,
)
_tape_select_bwd = define_op(
    "tape_select_bwd(Tensor query, Tensor keys, Tensor dweights, Tensor dponder, Tensor indices, "
    "Tensor counts, bool average_query, str loss_type) -> (Tensor dquery, Tensor dkeys)",
    _fake_bwd,
)


def check_bank_lens(bank_lens: Tensor | None, bank_size: int) -> None:
    """Refuse lengths outside the bank; copies to the host."""
    if bank_lens is not None and bool(((bank_lens < 0) | (bank_lens > bank_size)).any()):
        raise ValueError(
            f"bank_lens: expected 0 to {bank_size} (the bank's size), got {bank_lens.tolist()}"
        )


@register("tape_select", "eager")
def _eager(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: LossType,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_bank_lens(bank_lens, keys.shape[-2])
    selection = reference.tape_select(
        query,
        keys,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        average_query=average_query,
        loss_type=loss_type,
        read_mask=read_mask,
        bank_lens=bank_lens,
    )
    return selection.weights, selection.ponder, selection.indices, selection.counts


register("tape_select_bwd", "eager")(reference.tape_select_bwd)
register_compiled("tape_select")
register_compiled("tape_select_bwd")


@register_triton("tape_select")
def _triton_fwd(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: LossType,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query.device.type == "cpu":  # elsewhere that needs a copy to the host; the kernel clamps
        check_bank_lens(bank_lens, keys.shape[-2])
    scale = query.shape[1] ** -0.5
    query, keys = in_vectors(query), in_vectors(keys)
    (batch, key_dim), bank_size = query.shape, keys.shape[-2]
    config = _fwd_config(keys, topk)
    outputs = weights, ponder, indices, counts = _fake(query, keys, num_tape_tokens, topk)
    masks = (x if x is None else x.contiguous() for x in (read_mask, bank_lens))
    q = query.new_empty(batch, key_dim, dtype=torch.float32)
    tiles = config["NUM_TILES"] if config["NUM_TILES"] > 1 else 0
    order = query.new_empty(batch, tiles * config["BLOCK_M"], dtype=torch.int32)
    launch(
        _tape_select_fwd_kernel, (triton.cdiv(batch, config["BLOCK_B"]),),
        query, keys, *masks, q, order, weights, ponder, indices, counts,
        batch, bank_size, key_dim // config["VECTOR"], num_tape_tokens, topk, halt_threshold, scale,
        query.stride(0), *bank_strides(keys, config["VECTOR"]),
        AVERAGE_QUERY=average_query, ENTROPY=loss_type == "entropy", SHARED=keys.dim() == 2,
        **config,
    )  # fmt: skip
    return outputs


register_triton("tape_select_bwd")(triton_tape_select_bwd)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, keys, _, _, _, ctx.average_query, ctx.loss_type, _, _ = inputs
    _, _, indices, counts = output
    ctx.save_for_backward(query, keys, indices, counts)


def _backward(ctx: Any, dweights: Tensor, dponder: Tensor, dindices: Any, dcounts: Any) -> tuple:
    query, keys, indices, counts = ctx.saved_tensors
    dquery, dkeys = _tape_select_bwd(
        query, keys, dweights, dponder, indices, counts, ctx.average_query, ctx.loss_type
    )
    return dquery, dkeys, None, None, None, None, None, None, None


define_autograd("tape_select", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.tape_select, get_raw=True)
def _flops(query: Tensor, keys: Tensor, *options: Any, out_val: tuple, **names: Any) -> int:
    """One product of the query with every key of the bank, for each step that an example takes."""
    steps = int(out_val[3].sum())
    return 2 * steps * keys.shape[-2] * keys.shape[-1]
