"""Scoring one tile of a bank for `tape_select` in Triton: see triton_tiled_bank.py."""

from adatape_kernels.ops.tape_select.triton_primitives import ordered, ranked
from adatape_kernels.ops.triton_runtime import tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for


@triton.jit
def _bf16_parts(x):
    """Three addends of x that bfloat16 holds exactly, 8 of its 24 bits each; NaN stays NaN."""
    first = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    rest = x - first
    second = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, first, x), second, rest - second


@triton.jit
def _fp16_parts(x):
    """Numbers of float16 whose sum first + second / 2¹¹ + third / 2²² is x, up to 2⁻⁴⁷ or 2⁻³³ x.

    The first is zero only where x is, because an infinite key times x is infinite.
    """
    least = 5.9604644775390625e-8  # of float16
    first = x.to(tl.float16).to(tl.float32)
    first = tl.where((first == 0.0) & (x > 0.0), least, first)
    first = tl.where((first == 0.0) & (x < 0.0), -least, first)
    rest = (x - first) * 2048.0
    second = rest.to(tl.float16).to(tl.float32)
    return first, second, (rest - second) * 2048.0


@triton.jit
def _shared_scores(
    q_rows,
    key_rows,
    mask_b,
    mask_m,
    key_dim,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q · key in float32, (BLOCK_B, BLOCK_M); equal rows get equal bits wherever they stand."""
    high = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    middle = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    low = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    for start_k in range(0, key_dim, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < key_dim
        q = tl.load(q_rows[:, None] + offs_k, mask=mask_b[:, None] & mask_k, other=0.0)
        mask = mask_m & mask_k[:, None]
        key = tl.load(key_rows + offs_k[:, None], mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        if not SPLIT:
            high = tl.dot(q, key.to(tl.float32), high, input_precision="ieee")
        else:
            if key.dtype == tl.float16:
                first, second, third = _fp16_parts(q)
            else:
                first, second, third = _bf16_parts(q)
            high = tl.dot(first.to(key.dtype), key, high, input_precision="ieee")
            middle = tl.dot(second.to(key.dtype), key, middle, input_precision="ieee")
            low = tl.dot(third.to(key.dtype), key, low, input_precision="ieee")
    if key_rows.dtype.element_ty == tl.float16:
        middle = (middle + low * 0.00048828125) * 0.00048828125
    else:
        middle += low
    # An infinite key times a part that is zero is NaN, where q · key is infinite.
    return tl.where(tl.abs(high) < float("inf"), high + middle, high)


@triton.jit
def _own_scores(
    q_row,
    key_rows,
    mask_m,
    key_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for the one example of a program, (BLOCK_M,)."""
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start_k in range(0, key_dim, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < key_dim
        q = tl.load(q_row + offs_k, mask=mask_k, other=0.0)
        key = tl.load(key_rows[:, None] + offs_k, mask=mask_m[:, None] & mask_k, other=0.0)
        products += key.to(tl.float32) * q
    return tl.sum(products, 1)


@compiled_for(aligned=("q_ptr", "keys_ptr", "unread_ptr", "lists_ptr"))
def _tape_select_fwd_score_kernel(
    q_ptr,
    keys_ptr,
    unread_ptr,
    left_ptr,
    lists_ptr,
    batch,
    bank_size,
    key_dim,
    topk,
    tiles,
    stride_kb,
    stride_km,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """List the best entries of one tile in `lists_ptr` (batch, tiles, topk), best first."""
    key_dim *= VECTOR  # so that the compiler sees whole vectors
    blocks = tl.cdiv(batch, BLOCK_B)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < bank_size
    key_rows = keys_ptr + offs_m.to(tl.int64) * stride_km * VECTOR
    if SHARED:
        offs_b = block * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_b = offs_b < batch
        rows_b = offs_b.to(tl.int64)
        left = tl.load(left_ptr + offs_b, mask=mask_b, other=-1)
        if tl.max(left, 0) >= 0:
            unread_rows = unread_ptr + rows_b[:, None] * bank_size
            unread = tl.load(unread_rows + offs_m, mask=mask_b[:, None] & mask_m, other=0)
            q_rows = q_ptr + rows_b * key_dim
            scores = _shared_scores(
                q_rows, key_rows, mask_b, mask_m, key_dim, SPLIT, BLOCK_B, BLOCK_M, BLOCK_K
            )
            best_first = ranked(ordered(scores, unread != 0), offs_m[None, :])
            list_rows = lists_ptr + (rows_b * tiles + tile) * topk
            for j in range(topk):
                best = tl.max(best_first, 1)
                tl.store(list_rows + j, best, mask=mask_b)
                best_first = tl.where(best_first == best[:, None], -0x7FFFFFFFFFFFFFFF, best_first)
    else:
        example = block.to(tl.int64)
        if tl.load(left_ptr + example) >= 0:
            unread = tl.load(unread_ptr + example * bank_size + offs_m, mask=mask_m, other=0)
            scores = _own_scores(
                q_ptr + example * key_dim,
                key_rows + example * stride_kb * VECTOR,
                mask_m,
                key_dim,
                BLOCK_M,
                BLOCK_K,
            )
            best_first = ranked(ordered(scores, unread != 0), offs_m)
            for j in range(topk):
                best = tl.max(best_first, 0)
                tl.store(lists_ptr + (example * tiles + tile) * topk + j, best)
                best_first = tl.where(best_first == best, -0x7FFFFFFFFFFFFFFF, best_first)
