"""Attention over each example's input rows and tape rows (SPEC 6).

out[r] = Σ_c softmax_c(q[r] · k[c] · scale) v[c],   c over all input and tape rows of r's example
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels.backend import define_autograd, define_op, register, register_compiled
from adatape_kernels.elastic import check_offsets, check_offsets_tensor
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
            do not join or pass the number of rows, or an example has more than max_rows.

    Differentiable in q, k and v.

    Source: SPEC 6.
    """
    if q.dim() != 3 or not q.is_floating_point() or q.shape[2] == 0:
        raise ValueError(
            "q: expected floating-point (rows, num_heads, head_dim), head_dim at least 1, "
            f"got {q.dtype} {tuple(q.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected {q.dtype} {tuple(q.shape)} on {q.device} like q, "
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
    num_input_rows = int(cu_inputs[-1])
    check_offsets("cu_inputs", cu_inputs, 0, len(q), exact=False)
    check_offsets("cu_tapes", cu_tapes, num_input_rows, len(q), exact=False)
    longest = max((cu_inputs.diff() + cu_tapes.diff()).tolist(), default=0)
    if max_rows is not None and longest > max_rows:
        raise ValueError(f"max_rows: expected at least {longest} (the longest), got {max_rows}")
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


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_inputs, cu_tapes, ctx.max_rows, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_inputs, cu_tapes)


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
