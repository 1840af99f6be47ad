"""`elastic_attention` in Triton: a tile of queries passes over its example's keys once.

What a program waits for, with 207 rows of 64 features in float16: two loads to find its example,
one for queries and last keys together, one for the first of three tiles. While one tile is computed
the next is under way, and the one behind it follows as soon as there is room. On 9.0 the three
tiles leave room for four programs a multiprocessor.

Each of the four tiles of queries reads all keys, so that the L2 cache moves 407 MB for 256 examples
with 6 heads, where a program that kept all keys and values of its head would move 163. That would
take 82 kB and 150 registers a thread: half as many warps to a multiprocessor on 9.0, one program
where there are 99 kB, and on 8.0 more registers than a thread has. A small batch would have a
fourth of the programs. The kernel in CUDA C++ is of that kind.
"""

import math

import torch
from torch import Tensor

from adatape_kernels.ops.elastic_attention.triton_primitives import (
    Tile,
    find_tile,
    limits,
    load_tile,
    num_tiles,
    options_of,
    store_tile,
    tile_rows,
)
from adatape_kernels.ops.triton_runtime import kernel, launch, tl, triton
from adatape_kernels.ops.triton_specialization import compiled_for, with_dense_rows


@triton.jit
def _fits(place, last, BLOCK: tl.constexpr, BLOCK_LAST: tl.constexpr):
    """Whether a tile of BLOCK is the smaller of the two that hold the rows from `last` on."""
    count = place.num_rows - last
    return (count <= BLOCK_LAST) if BLOCK == BLOCK_LAST else (count > BLOCK_LAST)


@triton.jit
def _load_last(
    matrix,
    place,
    last,
    columns,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
):
    """Load the rows from `last` on if the tile of BLOCK is theirs, else none."""
    rows_n = tile_rows(place, last, BLOCK)
    exists = rows_n.exists & _fits(place, last, BLOCK, BLOCK_LAST)
    return load_tile(matrix, Tile(row=rows_n.row, exists=exists), columns, VECTOR, ZEROS=False)


@triton.jit
def _attend_last(state, q, k, v, place, last, columns, scale_log2, BLOCK: tl.constexpr):
    """Add the last keys, of which `_load_last` left undefined those that do not exist."""
    exists = tile_rows(place, last, BLOCK).exists
    mask = exists[:, None] & columns[1]
    k, v = tl.where(mask, k, 0.0), tl.where(mask, v, 0.0)
    return _attend(state, q, k, v, exists, scale_log2, TAIL=True)


@triton.jit
def _attend(state, q, k, v, exists, scale_log2, TAIL: tl.constexpr):
    """Add a tile of keys to the running softmax: Σ p v, Σ p and the largest score of each query."""
    acc, total, largest = state
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
    if TAIL:
        scores = tl.where(exists, scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1))
    # While all scores are -inf nothing may be subtracted: -inf - -inf is NaN.
    shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(largest - shift)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, largest_now


@compiled_for(aligned=("q_ptr", "k_ptr", "v_ptr", "out_ptr"))
def _elastic_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_inputs_ptr,
    cu_tapes_ptr,
    out_ptr,
    lse_ptr,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    rows,
    num_heads,
    batch,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
):
    """A tile of queries attends to its example; unused rows get zeros. Neighbours: the heads."""
    number, head = tl.program_id(0) // num_heads, (tl.program_id(0) % num_heads).to(tl.int64)
    example, tile, place = find_tile(number, cu_inputs_ptr, cu_tapes_ptr, rows, batch, BLOCK_M)
    if tile < 0:
        return
    rows_m = tile_rows(place, tile * BLOCK_M, BLOCK_M)
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    outs = out_ptr + head * HEAD_DIM, num_heads * HEAD_DIM
    lse_ptrs = lse_ptr + head * rows + rows_m.row
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if example == batch:  # unused rows
        store_tile(outs, rows_m, columns, acc, VECTOR)
        tl.store(lse_ptrs, total, rows_m.exists)
        return
    queries = q_ptr + tl.multiple_of(head * stride_qh, VECTOR), stride_qm
    keys = k_ptr + tl.multiple_of(head * stride_kh, VECTOR), stride_kn
    values = v_ptr + tl.multiple_of(head * stride_vh, VECTOR), stride_vn
    # The last keys come first: behind the loop, what only they need would take registers all
    # through it. They take a tile of BLOCK_LAST if they fit into one. No branch and no product
    # stands between these loads, so that one latency passes for all of them, and one more for the
    # first tiles of the loop.
    last = (place.num_rows - 1) // BLOCK_N * BLOCK_N
    q = load_tile(queries, rows_m, columns, VECTOR)
    state = acc, total, total - float("inf")
    if BLOCK_N > BLOCK_LAST:
        k_few = _load_last(keys, place, last, columns, VECTOR, BLOCK_LAST, BLOCK_LAST)
        v_few = _load_last(values, place, last, columns, VECTOR, BLOCK_LAST, BLOCK_LAST)
        k = _load_last(keys, place, last, columns, VECTOR, BLOCK_N, BLOCK_LAST)
        v = _load_last(values, place, last, columns, VECTOR, BLOCK_N, BLOCK_LAST)
        if _fits(place, last, BLOCK_N, BLOCK_LAST):
            state = _attend_last(state, q, k, v, place, last, columns, scale_log2, BLOCK_N)
        else:
            state = _attend_last(
                state, q, k_few, v_few, place, last, columns, scale_log2, BLOCK_LAST
            )
    else:
        rows_n = tile_rows(place, last, BLOCK_N)
        k = load_tile(keys, rows_n, columns, VECTOR)
        v = load_tile(values, rows_n, columns, VECTOR)
        state = _attend(state, q, k, v, rows_n.exists, scale_log2, TAIL=True)
    # Where products take operands from registers, those hoisted out of the loop would fill them.
    for start in tl.range(0, last, BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N, FULL=True)
        k = load_tile(keys, rows_n, columns, VECTOR)
        v = load_tile(values, rows_n, columns, VECTOR)
        state = _attend(state, q, k, v, rows_n.exists, scale_log2, TAIL=False)
    acc, total, largest = state
    store_tile(outs, rows_m, columns, acc * (1 / total)[:, None], VECTOR)
    tl.store(lse_ptrs, (largest + tl.log2(total)) * 0.6931471805599453, rows_m.exists)


@kernel(limits)
def elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel."""
    rows, num_heads, head_dim = q.shape
    options = options_of(q.dtype, head_dim, backward=False)
    vector = options["VECTOR"]
    q, k, v = with_dense_rows(q, vector), with_dense_rows(k, vector), with_dense_rows(v, vector)
    (stride_qm, stride_qh, _), (stride_kn, stride_kh, _) = q.stride(), k.stride()
    stride_vn, stride_vh, _ = v.stride()
    out = q.new_empty(rows, num_heads, head_dim)
    lse = q.new_empty(num_heads, rows, dtype=torch.float32)
    batch = cu_inputs.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    launch(
        _elastic_attention_fwd_kernel,
        (num_tiles(rows, batch, options["BLOCK_M"]) * num_heads,),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        cu_inputs_ptr=cu_inputs.contiguous(),
        cu_tapes_ptr=cu_tapes.contiguous(),
        out_ptr=out,
        lse_ptr=lse,
        stride_qm=stride_qm,
        stride_qh=stride_qh,
        stride_kn=stride_kn,
        stride_kh=stride_kh,
        stride_vn=stride_vn,
        stride_vh=stride_vh,
        rows=rows,
        num_heads=num_heads,
        batch=batch,
        scale_log2=scale * math.log2(math.e),
        BLOCK_LAST=16 if head_dim <= 128 else options["BLOCK_N"],
        **options,
    )
    return out, lse


@kernel(limits)
def elastic_attention_qkvpacked(
    qkv: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the three parts of qkv."""
    return elastic_attention.function(*qkv.unbind(1), cu_inputs, cu_tapes, max_rows, softmax_scale)
