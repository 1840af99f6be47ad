"""The gradients of `elastic_attention` in Triton: one program a tile, dq first, then dk and dv.

So no sum crosses programs, and bits repeat, at the price of seven products where five would do. A
kernel of five adds dq up in float32 in memory, by atomics. For 256 examples of 207 rows with 6
heads of 64 such a one, in tiles of 128 × 128, computes 5 · 256 · 256 products of rows where ours
computes 7 · 256 · 224, 1.2 times as many (1.4 times for 256 rows); it moves about 610 MB of memory
where ours moves 370. The page about GPUs' performance has what forms of fewer products would cost.

Two tiles of 32 rows are under way while one is computed. Tiles of 64 × 64 would wait for half as
many products, but take 255 registers a thread, which leaves room for two programs a multiprocessor
of 9.0, not three. One pass that keeps dk and dv of 256 keys would take five products and no
atomics, but eight warps' 128 of 255 registers for these sums alone: one program a multiprocessor,
for an example of 50 rows too, or one form for each length.
"""

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
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl, triton
from adatape_kernels.ops.triton_specialization import (
    ALIGNMENT,
    compiled_for,
    dense,
    with_dense_rows,
)


@compiled_for(aligned=("dout_ptr", "out_ptr"))
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
    rows_m = Tile(row=row, exists=row < rows)
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    douts = dout_ptr + tl.multiple_of(head * stride_dh, VECTOR), stride_dm
    outs = out_ptr + head * HEAD_DIM, num_heads * HEAD_DIM
    dout = load_tile(douts, rows_m, columns, VECTOR).to(tl.float32)
    delta = tl.sum(dout * load_tile(outs, rows_m, columns, VECTOR), 1)
    tl.store(delta_ptr + head * rows + row, delta, rows_m.exists)


@triton.jit
def _probabilities(a, b, lse, exists, scale_log2):
    """Return the softmax of a · bᵀ, queries by keys or keys by queries, from the queries' lse.

    Where no query or no key exists its row is zero, whose product with infinity is NaN.
    """
    scores = tl.dot(a, tl.trans(b), input_precision="ieee") * scale_log2
    return tl.where(exists, tl.exp2(scores - lse), 0.0)


@triton.jit
def _score_gradients(p, a, b, delta, exists):
    """Return the gradient of the scores: p · (a · bᵀ - delta), a and b being dout and values."""
    ds = p * (tl.dot(a, tl.trans(b), input_precision="ieee") - delta)
    return tl.where(exists, ds, 0.0)


@compiled_for(aligned=("dout_ptr", "q_ptr", "k_ptr", "v_ptr", "dq_ptr", "dk_ptr", "dv_ptr"))
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
    stride_gm,
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
    """dq of a tile from all keys, and dk and dv of the same rows from all queries."""
    log2_e: tl.constexpr = 1.4426950408889634
    number, head = tl.program_id(0) // num_heads, (tl.program_id(0) % num_heads).to(tl.int64)
    example, tile, place = find_tile(number, cu_inputs_ptr, cu_tapes_ptr, rows, batch, BLOCK_M)
    if tile < 0:
        return
    rows_m = tile_rows(place, tile * BLOCK_M, BLOCK_M)
    columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < HEAD_DIM
    dqs = dq_ptr + head * HEAD_DIM, stride_gm
    dks = dk_ptr + head * HEAD_DIM, stride_gm
    dvs = dv_ptr + head * HEAD_DIM, stride_gm
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if example == batch:  # unused rows
        store_tile(dqs, rows_m, columns, dq, VECTOR)
        store_tile(dks, rows_m, columns, dq, VECTOR)
        store_tile(dvs, rows_m, columns, dq, VECTOR)
        return
    douts = dout_ptr + tl.multiple_of(head * stride_dh, VECTOR), stride_dm
    queries = q_ptr + tl.multiple_of(head * stride_qh, VECTOR), stride_qm
    keys = k_ptr + tl.multiple_of(head * stride_kh, VECTOR), stride_kn
    values = v_ptr + tl.multiple_of(head * stride_vh, VECTOR), stride_vn
    lse_ptr += head * rows
    delta_ptr += head * rows
    scale_log2 = scale * log2_e

    q = load_tile(queries, rows_m, columns, VECTOR)
    dout = load_tile(douts, rows_m, columns, VECTOR)
    lse = tl.load(lse_ptr + rows_m.row, rows_m.exists, other=0.0)[:, None] * log2_e
    delta = tl.load(delta_ptr + rows_m.row, rows_m.exists, other=0.0)[:, None]
    for start in tl.range(0, place.num_rows, BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N)
        k_n = load_tile(keys, rows_n, columns, VECTOR)
        v_n = load_tile(values, rows_n, columns, VECTOR)
        p = _probabilities(q, k_n, lse, rows_n.exists, scale_log2)  # queries by keys
        ds = _score_gradients(p, dout, v_n, delta, rows_n.exists)
        dq = tl.dot(ds.to(k_n.dtype), k_n, dq, input_precision="ieee")

    store_tile(dqs, rows_m, columns, dq * scale, VECTOR)

    k = load_tile(keys, rows_m, columns, VECTOR)
    v = load_tile(values, rows_m, columns, VECTOR)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, place.num_rows, BLOCK_N, disable_licm=True):
        rows_n = tile_rows(place, start, BLOCK_N)
        q_n = load_tile(queries, rows_n, columns, VECTOR)
        dout_n = load_tile(douts, rows_n, columns, VECTOR)
        lse_n = tl.load(lse_ptr + rows_n.row, rows_n.exists, other=0.0) * log2_e
        delta_n = tl.load(delta_ptr + rows_n.row, rows_n.exists, other=0.0)
        p = _probabilities(k, q_n, lse_n, rows_n.exists, scale_log2)  # keys by queries
        dv = tl.dot(p.to(dout_n.dtype), dout_n, dv, input_precision="ieee")
        ds = _score_gradients(p, v, dout_n, delta_n, rows_n.exists)
        dk = tl.dot(ds.to(q_n.dtype), q_n, dk, input_precision="ieee")
    store_tile(dks, rows_m, columns, dk * scale, VECTOR)
    store_tile(dvs, rows_m, columns, dv, VECTOR)


# Features of a program that sums out · dout, in at most so many rows.
_DELTA_FEATURES, _DELTA_ROWS = 2048, 32


@kernel(limits)
def elastic_attention_bwd(
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
    """Launch the kernels."""
    rows, num_heads, head_dim = q.shape
    dq = q.new_empty(rows, num_heads, head_dim)
    dk = q.new_empty(rows, num_heads, head_dim)
    dv = q.new_empty(rows, num_heads, head_dim)
    vector = options_of(q.dtype, head_dim, backward=True)["VECTOR"]
    q, k, v = with_dense_rows(q, vector), with_dense_rows(k, vector), with_dense_rows(v, vector)
    _write_gradients(dq, dk, dv, dout, q, k, v, out, lse, cu_inputs, cu_tapes, softmax_scale)
    return dq, dk, dv


@kernel(limits)
def elastic_attention_qkvpacked_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> Tensor:
    """Launch the kernels, which write into the three parts of one gradient.

    Where the parts do not all begin at multiples of 16 bytes, as the kernels take it for granted,
    they are read from copies, and written apart first.
    """
    rows, _, num_heads, head_dim = qkv.shape
    q, k, v = qkv.unbind(1)
    dqkv = qkv.new_empty(rows, 3, num_heads, head_dim)
    apart = bool(num_heads * head_dim * qkv.element_size() % ALIGNMENT)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3)) if apart else dqkv.unbind(1)
    # Of a dense qkv whose parts are not apart, these are dense enough as they are.
    if apart or not qkv.is_contiguous() or qkv.data_ptr() % ALIGNMENT:
        vector = options_of(q.dtype, head_dim, backward=True)["VECTOR"]
        q, k, v = with_dense_rows(q, vector), with_dense_rows(k, vector), with_dense_rows(v, vector)
    _write_gradients(dq, dk, dv, dout, q, k, v, out, lse, cu_inputs, cu_tapes, softmax_scale)
    return torch.stack((dq, dk, dv), 1, out=dqkv) if apart else dqkv


def _write_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    softmax_scale: float | None,
) -> None:
    """Launch the kernels, which write dq, dk and dv; the three have the same strides.

    From a head to the next it is head_dim. The rows of q, k and v are as `with_dense_rows` returns
    them.
    """
    rows, num_heads, head_dim = q.shape
    options = options_of(q.dtype, head_dim, backward=True)
    vector, block_d = options["VECTOR"], options["BLOCK_D"]
    dout, out, lse = with_dense_rows(dout, vector), dense(out), lse.contiguous()
    (stride_dm, stride_dh, _), (stride_qm, stride_qh, _) = dout.stride(), q.stride()
    (stride_kn, stride_kh, _), (stride_vn, stride_vh, _) = k.stride(), v.stride()
    delta = lse.new_empty(num_heads, rows)
    batch = cu_inputs.shape[0] - 1
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    block_delta = min(_DELTA_FEATURES // block_d, _DELTA_ROWS)
    launch(
        _elastic_attention_delta_kernel,
        (num_blocks(rows, block_delta) * num_heads,),
        dout_ptr=dout,
        out_ptr=out,
        delta_ptr=delta,
        stride_dm=stride_dm,
        stride_dh=stride_dh,
        rows=rows,
        num_heads=num_heads,
        HEAD_DIM=head_dim,
        VECTOR=vector,
        BLOCK_D=block_d,
        BLOCK_M=block_delta,
        num_warps=4,
    )
    launch(
        _elastic_attention_bwd_kernel,
        (num_tiles(rows, batch, options["BLOCK_M"]) * num_heads,),
        dout_ptr=dout,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        lse_ptr=lse,
        delta_ptr=delta,
        cu_inputs_ptr=cu_inputs.contiguous(),
        cu_tapes_ptr=cu_tapes.contiguous(),
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        stride_dm=stride_dm,
        stride_dh=stride_dh,
        stride_qm=stride_qm,
        stride_qh=stride_qh,
        stride_kn=stride_kn,
        stride_kh=stride_kh,
        stride_vn=stride_vn,
        stride_vh=stride_vh,
        stride_gm=dq.stride(0),
        rows=rows,
        num_heads=num_heads,
        batch=batch,
        scale=scale,
        # ptxas would spill two registers to have fewer than 97 on 10.0.
        maxnreg=128 if q.dtype != torch.float32 and head_dim <= 16 else None,
        **options,
    )
