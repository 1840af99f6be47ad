"""`elastic_attention` of queries, keys and values that one projection made (SPEC 6).

out = elastic_attention(q, k, v, …),   [q, k, v] = qkv

The gradient of qkv is one tensor, whose parts the kernels write. Autograd would stack it of dq, dk
and dv, in a pass that reads and writes it once more: at 52,992 rows of 384 features in bfloat16,
which are 256 examples of S/16, this moves 244 MB a layer.
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.offsets import check_examples
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import attention_checks
from adatape_kernels.ops.elastic_attention import (
    check_options,
    compiled,
    eager,
    flops_of,
    no_tapes,
    offsets_of_rows,
    triton_backward,
    triton_forward,
    typical_calls,
)
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.kernel_form import at_once_in_form
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable


def elastic_attention_qkvpacked(
    qkv: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    max_rows: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Do what `elastic_attention` does, where one projection made queries, keys and values.

    The results are the same to the bit. The gradient is written as one tensor, where those of q, k
    and v would have to be stacked.

    Args:
        qkv: (rows, 3, num_heads, head_dim), the queries, keys and values of each row, in the layout
            of `ElasticBatch`; float32, float16, bfloat16 or float64; any strides.
        cu_inputs, cu_tapes, max_rows, softmax_scale: as in `elastic_attention`.

    Returns:
        (rows, num_heads, head_dim), dtype of qkv, contiguous; zero in unused rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or as `elastic_attention`.
        TypeError: an argument is of another type altogether.

    Differentiable in qkv.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8))
        >>> projection = torch.nn.Linear(8, 24)
        >>> qkv = projection(x.data).view(-1, 3, 2, 4)
        >>> ak.ops.elastic_attention_qkvpacked(qkv, x.cu_inputs, x.cu_tapes).shape
        torch.Size([6, 2, 4])

    Source: SPEC 6; the layout is that of flash_attn_varlen_qkvpacked_func.
    """
    found = _FORWARD.at_once(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale)
    if found is None:
        _check(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale)
        cu_inputs, cu_tapes = offsets_of_rows(qkv, cu_inputs, cu_tapes)
        found = _FORWARD.overload(qkv, cu_inputs, cu_tapes, max_rows, softmax_scale)
    out, _ = found
    return out


def _check(qkv: Tensor, *options: Any) -> None:
    check_tensor("qkv", qkv)
    check_options(*options)
    shape, dtype = qkv.shape, qkv.dtype
    if len(shape) != 4 or dtype not in FLOAT_DTYPES or shape[1] != 3 or shape[3] == 0:
        raise ValueError(
            "qkv: expected floating-point of 16 to 64 bits (rows, 3, num_heads, head_dim), "
            "head_dim at least 1, "
            f"got {dtype} {tuple(shape)}"
        )


def _fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, _, num_heads, head_dim = qkv.shape
    lse = qkv.new_empty(num_heads, rows, dtype=wide_dtype(qkv.dtype))
    return qkv.new_empty(rows, num_heads, head_dim), lse


def _fake_bwd(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _check_values(
    qkv: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    check_examples(cu_inputs, cu_tapes, len(qkv), max_rows)


def _check_values_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> None:
    _check_values(qkv, *rest)


def _typical(head_dim: int, max_rows: int | None) -> Any:
    """Return what makes a call of three examples with three heads."""
    return lambda dtype: (
        meta(600, 3, 3, head_dim, dtype=dtype),
        *(meta(4, dtype=torch.int32) for _ in range(2)),
        *(max_rows, None),
    )


def _typical_bwd(head_dim: int, max_rows: int | None) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        qkv, *rest = _typical(head_dim, max_rows)(dtype)
        out = meta(600, 3, head_dim, dtype=dtype)
        return out, qkv, out, meta(3, 600, dtype=wide_dtype(dtype)), *rest

    return make


_FORWARD = Operation(
    "elastic_attention_qkvpacked(Tensor qkv, Tensor cu_inputs, Tensor cu_tapes, "
    "SymInt? max_rows, float? softmax_scale) -> (Tensor out, Tensor lse)",
    _fake,
    {
        "eager": eager.packed_forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.elastic_attention_qkvpacked,
        "cuda": compiled.cuda_forward,
    },
    typical=typical_calls(_typical),
    check_arguments=attention_checks.elastic_attention_qkvpacked,
    check_values=_check_values,
    int32=("cu_inputs", "cu_tapes"),
)
without_tapes = at_once_in_form(
    _FORWARD,
    "varlen_attention_qkvpacked(Tensor qkv, Tensor cu_inputs, Tensor? cu_tapes, SymInt? max_rows, "
    "float? softmax_scale) -> (Tensor out, Tensor lse)",
    int32=("cu_inputs",),
)
"""As that of `elastic_attention`."""
_BACKWARD = Operation(
    "elastic_attention_qkvpacked_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, "
    "Tensor cu_inputs, Tensor cu_tapes, SymInt? max_rows, float? softmax_scale) -> Tensor",
    _fake_bwd,
    {
        "eager": eager.packed_backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.elastic_attention_qkvpacked_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical=typical_calls(_typical_bwd),
    check_arguments=attention_checks.elastic_attention_qkvpacked_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_inputs, cu_tapes, ctx.max_rows, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_inputs, cu_tapes)
    ctx.set_materialize_grads(False)  # lse has none


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple:
    *saved, cu_inputs, cu_tapes = ctx.saved_tensors
    offsets = cu_inputs, no_tapes(cu_inputs) if cu_tapes is None else cu_tapes
    dqkv = _BACKWARD.overload(dout, *saved, *offsets, ctx.max_rows, ctx.softmax_scale)
    return dqkv, None, None, None, None


def _attended(
    qkv: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return reference.elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale)


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    qkv, cu_inputs, cu_tapes, _, softmax_scale = inputs
    return _attended(qkv, cu_inputs, cu_tapes, softmax_scale)


def _gradients(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, ...]:
    def attended(qkv: Tensor) -> Tensor:
        return _attended(qkv, cu_inputs, cu_tapes, softmax_scale)[0]

    return gradient_of(attended, (qkv,), (dout,))


def _closed_form(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(1)
    out, lse = _attended(qkv, cu_inputs, cu_tapes, softmax_scale)
    parts = reference.elastic_attention_bwd(
        dout, q, k, v, out, lse, cu_inputs, cu_tapes, softmax_scale
    )
    return (torch.stack(parts, 1),)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients, _closed_form)


@flop_formula(torch.ops.adatape.elastic_attention_qkvpacked, get_raw=True)
def _flops(qkv: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *rest: Any, **kw: Any) -> int:
    """As many as `elastic_attention` has."""
    return flops_of(qkv.shape[2] * qkv.shape[3], cu_inputs, cu_tapes)


@flop_formula(torch.ops.adatape.elastic_attention_qkvpacked_bwd, get_raw=True)
def _flops_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *rest: Any,
    **kw: Any,
) -> int:
    """As many as `elastic_attention_bwd` has: five products for the forward's two."""
    return _flops(qkv, cu_inputs, cu_tapes) * 5 // 2
