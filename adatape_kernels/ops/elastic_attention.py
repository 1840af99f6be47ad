"""Attention over each example's input rows and tape rows (SPEC 6).

out[r] = Σ_c softmax_c(q[r] · k[c] · scale) v[c],   c over all input and tape rows of r's example
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels._triton import launch, tl, triton
from adatape_kernels.backend import (
    define_autograd,
    define_op,
    register,
    register_compiled,
    register_triton,
)
from adatape_kernels.elastic import check_offsets, check_offsets_tensor
from adatape_kernels.ops.elastic_tiles import find_tile, load_tile, num_tiles, store_tile, tile_rows
from adatape_kernels.reference import wide_dtype


def elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    max_rows: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Let every row attend to the input and tape rows of its own example, and to nothing else.

    Args:
        q, k, v: (rows, num_heads, head_dim), in the layout of `ElasticBatch`; float32, float16,
            bfloat16 or float64; any strides.
        cu_inputs: (batch + 1,) int32, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32, the bounds of each example's tape rows; starts where
            cu_inputs ends; rows behind its end are unused.
        max_rows: a bound on the rows of one example, if known.
        softmax_scale: factor on the scores; None for 1 / sqrt(head_dim).

    Returns:
        (rows, num_heads, head_dim), dtype of q, contiguous; zero in unused rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, the offsets do not ascend,
            do not join or pass the number of rows, or an example has more than max_rows. On a GPU
            these values stay unseen: wrong offsets attend to wrong rows, and an example of more
            than max_rows gets what it should or, from CUDA C++, NaN.

    Differentiable in q, k and v.

    Source: SPEC 6.
    """
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 3 or not dtype.is_floating_point or shape[2] == 0:
        raise ValueError(
            "q: expected floating-point (rows, num_heads, head_dim), head_dim at least 1, "
            f"got {dtype} {tuple(shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}: expected {dtype} {tuple(shape)} on {device} like q, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    check_offsets_tensor("cu_inputs", cu_inputs, q)
    check_offsets_tensor("cu_tapes", cu_tapes, q)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )
    out, _ = _elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
    return out


@triton.jit
def _fits(tail, SIZE: tl.constexpr):
    """Whether a tile of SIZE, a power of two from 16 on, is the smallest that holds the tail."""
    return (tail <= SIZE) & (tail > (SIZE // 2 if SIZE > 16 else 0))


@triton.jit
def _attend(
    state, q, keys, values, rows_n, columns, scale_log2, TAIL: tl.constexpr, VECTOR: tl.constexpr
):
    """Add a tile of keys to the running softmax: Σ p v, Σ p and the largest score of each query."""
    acc, total, largest = state
    k = load_tile(keys, rows_n, columns, VECTOR)
    v = load_tile(values, rows_n, columns, VECTOR)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
    if TAIL:
        scores = tl.where(rows_n[1], scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1))
    # While all scores are -inf nothing may be subtracted: -inf - -inf is NaN.
    shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(largest - shift)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, largest_now


@triton.jit
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
):
    """A tile of queries attends to its example; unused rows get zeros. Neighbours: the heads."""
    number, head = tl.program_id(0) // num_heads, (tl.program_id(0) % num_heads).to(tl.int64)
    example, tile, place = find_tile(number, cu_inputs_ptr, cu_tapes_ptr, rows, batch, BLOCK_M)
    if tile < 0:
        return
    rows_m = tile_rows(place, tile * BLOCK_M, BLOCK_M)
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    outs = out_ptr + head * HEAD_DIM, num_heads * HEAD_DIM
    lse_ptrs = lse_ptr + head * rows + rows_m[0]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if example == batch:  # unused rows
        store_tile(outs, rows_m, columns, acc, VECTOR)
        tl.store(lse_ptrs, total, rows_m[1])
        return
    queries = q_ptr + tl.multiple_of(head * stride_qh, VECTOR), stride_qm
    keys = k_ptr + tl.multiple_of(head * stride_kh, VECTOR), stride_kn
    values = v_ptr + tl.multiple_of(head * stride_vh, VECTOR), stride_vn
    q = load_tile(queries, rows_m, columns, VECTOR)
    state = acc, total, total - float("inf")
    # The last keys first, in the smallest tile that holds them: behind the loop, what only they
    # need would take registers all through it. Often they are all keys.
    last = (place[3] - 1) // BLOCK_N * BLOCK_N
    for halvings in tl.static_range(BLOCK_N // 32 + 1):
        if _fits(place[3] - last, BLOCK_N >> halvings):
            rows_n = tile_rows(place, last, BLOCK_N >> halvings)
            state = _attend(state, q, keys, values, rows_n, columns, scale_log2, True, VECTOR)
    # Where products take operands from registers, those hoisted out of the loop would fill them.
    for start in tl.range(0, last, BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N, FULL=True)
        state = _attend(state, q, keys, values, rows_n, columns, scale_log2, False, VECTOR)
    acc, total, largest = state
    store_tile(outs, rows_m, columns, acc * (1 / total)[:, None], VECTOR)
    tl.store(lse_ptrs, (largest + tl.log2(total)) * 0.6931471805599453, rows_m[1])


@triton.jit
def _elastic_attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    stride_dm,
    stride_dh,
    rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta[h, r] = Σ_d dout[r, h, d] · out[r, h, d]; of unused rows too, which nobody reads."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    row = (tl.program_id(0) // num_heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_m = row, row < rows
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    douts = dout_ptr + tl.multiple_of(head * stride_dh, VECTOR), stride_dm
    outs = out_ptr + head * HEAD_DIM, num_heads * HEAD_DIM
    dout = load_tile(douts, rows_m, columns, VECTOR).to(tl.float32)
    delta = tl.sum(dout * load_tile(outs, rows_m, columns, VECTOR), 1)
    tl.store(delta_ptr + head * rows + row, delta, rows_m[1])


@triton.jit
def _elastic_attention_bwd_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    cu_inputs_ptr,
    cu_tapes_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_dm,
    stride_dh,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    rows,
    num_heads,
    batch,
    scale,
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile as keys, from all queries; then dq of the same tile, from all keys."""
    log2_e: tl.constexpr = 1.4426950408889634
    number, head = tl.program_id(0) // num_heads, (tl.program_id(0) % num_heads).to(tl.int64)
    example, tile, place = find_tile(number, cu_inputs_ptr, cu_tapes_ptr, rows, batch, BLOCK_M)
    if tile < 0:
        return
    rows_m = tile_rows(place, tile * BLOCK_M, BLOCK_M)
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    offset, stride = head * HEAD_DIM, num_heads * HEAD_DIM
    dqs, dks, dvs = (dq_ptr + offset, stride), (dk_ptr + offset, stride), (dv_ptr + offset, stride)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if example == batch:  # unused rows
        store_tile(dqs, rows_m, columns, dq, VECTOR)
        store_tile(dks, rows_m, columns, dk, VECTOR)
        store_tile(dvs, rows_m, columns, dv, VECTOR)
        return
    douts = dout_ptr + tl.multiple_of(head * stride_dh, VECTOR), stride_dm
    queries = q_ptr + tl.multiple_of(head * stride_qh, VECTOR), stride_qm
    keys = k_ptr + tl.multiple_of(head * stride_kh, VECTOR), stride_kn
    values = v_ptr + tl.multiple_of(head * stride_vh, VECTOR), stride_vn
    lse_ptr += head * rows
    delta_ptr += head * rows

    k = load_tile(keys, rows_m, columns, VECTOR)
    v = load_tile(values, rows_m, columns, VECTOR)
    for start in tl.range(0, place[3], BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N)
        q_n = load_tile(queries, rows_n, columns, VECTOR)
        dout_n = load_tile(douts, rows_n, columns, VECTOR)
        # Where there is no query, p is exp2(-inf) = 0.
        lse_n = tl.load(lse_ptr + rows_n[0], rows_n[1], other=float("inf")) * log2_e
        delta_n = tl.load(delta_ptr + rows_n[0], rows_n[1], other=0.0)
        scores = tl.dot(k, tl.trans(q_n), input_precision="ieee") * (scale * log2_e)
        p = tl.exp2(scores - lse_n)  # (BLOCK_M keys, BLOCK_N queries)
        dv = tl.dot(p.to(dout_n.dtype), dout_n, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout_n), input_precision="ieee") - delta_n)
        dk = tl.dot(ds.to(q_n.dtype), q_n, dk, input_precision="ieee")
    store_tile(dks, rows_m, columns, dk * scale, VECTOR)
    store_tile(dvs, rows_m, columns, dv, VECTOR)

    q = load_tile(queries, rows_m, columns, VECTOR)
    dout = load_tile(douts, rows_m, columns, VECTOR)
    lse = tl.load(lse_ptr + rows_m[0], rows_m[1], other=float("inf"))[:, None] * log2_e
    delta = tl.load(delta_ptr + rows_m[0], rows_m[1], other=0.0)[:, None]
    for start in tl.range(0, place[3], BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N)
        k_n = load_tile(keys, rows_n, columns, VECTOR)
        v_n = load_tile(values, rows_n, columns, VECTOR)
        scores = tl.dot(q, tl.trans(k_n), input_precision="ieee") * (scale * log2_e)
        p = tl.exp2(tl.where(rows_n[1], scores, float("-inf")) - lse)  # (BLOCK_M, BLOCK_N keys)
        ds = p * (tl.dot(dout, tl.trans(v_n), input_precision="ieee") - delta)
        dq = tl.dot(ds.to(k_n.dtype), k_n, dq, input_precision="ieee")
    store_tile(dqs, rows_m, columns, dq * scale, VECTOR)


def _unit_stride(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Return the tensors with adjacent columns, and their strides by row and head."""
    dense = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    return dense, [stride for x in dense for stride in x.stride()[:2]]


def _options(q: Tensor, strides: list[int], *, backward: bool) -> dict[str, int]:
    """Choose tiles by dtype and head_dim alone: an example's bits may not follow its batch."""
    head_dim = q.shape[2]
    if q.dtype == torch.float32:  # without tensor cores, operands in registers
        block_m, block_n = 32, 32 if head_dim <= 64 else 16
        num_warps = 4 if head_dim <= 32 else 8
    else:
        block_m = 32 if backward and head_dim > 128 else 64
        block_n = 32 if backward or head_dim > 128 else 64
        num_warps = 4 if head_dim <= 64 else 8
    return {
        "HEAD_DIM": head_dim,
        "VECTOR": math.gcd(16 // q.element_size(), head_dim, *strides),
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": 2,
    }


def _triton_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    rows, num_heads, head_dim = q.shape
    if head_dim > 256:
        return _eager(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
    if q.device.type == "cpu":  # where looking costs no copy
        check_examples(q, cu_inputs, cu_tapes, max_rows)
    (q, k, v), strides = _unit_stride(q, k, v)
    out, lse = q.new_empty(q.shape), q.new_empty(num_heads, rows, dtype=torch.float32)
    batch, scale = len(cu_inputs) - 1, head_dim**-0.5 if softmax_scale is None else softmax_scale
    options = _options(q, strides, backward=False)
    launch(
        _elastic_attention_fwd_kernel,
        (num_tiles(rows, batch, options["BLOCK_M"]) * num_heads,),
        *(q, k, v, cu_inputs, cu_tapes, out, lse),
        *strides,
        *(rows, num_heads, batch, scale * math.log2(math.e)),
        **options,
    )
    return out, lse


def _triton_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_heads, head_dim = q.shape
    if head_dim > 256:
        return _eager_bwd(dout, q, k, v, out, lse, cu_inputs, cu_tapes, max_rows, softmax_scale)
    (dout, q, k, v), strides = _unit_stride(dout, q, k, v)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    delta = lse.new_empty(lse.shape)
    batch, scale = len(cu_inputs) - 1, head_dim**-0.5 if softmax_scale is None else softmax_scale
    options = _options(q, strides, backward=True)
    launch(
        _elastic_attention_delta_kernel,
        (triton.cdiv(rows, 32) * num_heads,),
        *(dout, out, delta),
        *strides[:2],
        *(rows, num_heads),
        **{name: options[name] for name in ("HEAD_DIM", "VECTOR", "BLOCK_D")},
        BLOCK_M=32,
        num_warps=4,
    )
    launch(
        _elastic_attention_bwd_kernel,
        (num_tiles(rows, batch, options["BLOCK_M"]) * num_heads,),
        *(dout, q, k, v, lse, delta, cu_inputs, cu_tapes, dq, dk, dv),
        *strides,
        *(rows, num_heads, batch, scale),
        **options,
    )
    return dq, dk, dv


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(num_heads, rows, dtype=wide_dtype(q.dtype))


def _fake_bwd(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


_elastic_attention = define_op(
    "elastic_attention(Tensor q, Tensor k, Tensor v, Tensor cu_inputs, Tensor cu_tapes, "
    "SymInt? max_rows, float? softmax_scale) -> (Tensor out, Tensor lse)",
    _fake,
)
_elastic_attention_bwd = define_op(
    "elastic_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_inputs, Tensor cu_tapes, SymInt? max_rows, float? softmax_scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _fake_bwd,
)


def check_examples(q: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, max_rows: int | None) -> None:
    """Check the values of the offsets, and that no example passes max_rows. Raises ValueError."""
    num_input_rows = int(cu_inputs[-1])
    check_offsets("cu_inputs", cu_inputs, 0, len(q), exact=False)
    check_offsets("cu_tapes", cu_tapes, num_input_rows, len(q), exact=False)
    longest = max((cu_inputs.diff() + cu_tapes.diff()).tolist(), default=0)
    if max_rows is not None and longest > max_rows:
        raise ValueError(f"max_rows: expected at least {longest} (the longest), got {max_rows}")


@register("elastic_attention", "eager")
def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    check_examples(q, cu_inputs, cu_tapes, max_rows)
    return reference.elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale)


@register("elastic_attention_bwd", "eager")
def _eager_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.elastic_attention_bwd(
        dout, q, k, v, out, lse, cu_inputs, cu_tapes, softmax_scale
    )


register_compiled("elastic_attention")
register_compiled("elastic_attention_bwd")
register_triton("elastic_attention")(_triton_fwd)
register_triton("elastic_attention_bwd")(_triton_bwd)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_inputs, cu_tapes, ctx.max_rows, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_inputs, cu_tapes)
    ctx.set_materialize_grads(False)  # lse has none


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple:
    grads = _elastic_attention_bwd(dout, *ctx.saved_tensors, ctx.max_rows, ctx.softmax_scale)
    return *grads, None, None, None, None


define_autograd("elastic_attention", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.elastic_attention, get_raw=True)
def _flops(
    q: Tensor, k: Tensor, v: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *rest: Any, **kw: Any
) -> int:
    """Two products of 2 · L² · head_dim a head and example, over the rows that exist."""
    lens = (cu_inputs.diff() + cu_tapes.diff()).long()
    return 4 * q.shape[1] * q.shape[2] * int(lens.square().sum())


@register_flop_formula(torch.ops.adatape.elastic_attention_bwd, get_raw=True)
def _flops_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *rest: Any,
    **kw: Any,
) -> int:
    """Five products of the forward's size, the scores among them once more."""
    return _flops(q, k, v, cu_inputs, cu_tapes) * 5 // 2
