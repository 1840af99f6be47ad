"""Attention over each example's input rows and tape rows (SPEC 6).

out[r] = Σ_c softmax_c(q[r] · k[c] · scale) v[c],   c over all input and tape rows of r's example
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_int, check_number, check_tensor
from adatape_kernels.offsets import as_int32, check_examples, check_offsets_tensor
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import attention_checks
from adatape_kernels.ops.elastic_attention import compiled, eager, triton_backward, triton_forward
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.kernel_form import at_once_in_form
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable


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
        cu_inputs: (batch + 1,) int32 or int64, the bounds of each example's input rows.
        cu_tapes: (batch + 1,) int32 or int64, the bounds of each example's tape rows; starts where
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
        TypeError: an argument is of another type altogether.

    Differentiable in q, k and v. The backward pass forms each weight once more, as the exponential
    of a score less the row's log-sum-exp, in float32 (float64 for float64). Of a score of 1e4
    float32 keeps three decimals, of one above 1e7 none: gradients are then no more exact than that,
    and above 1e9 they may be NaN. Results are exact for scores of any size.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> q = torch.zeros(3, 1, 2)  # two input rows, then a tape row of the first example
        >>> v = torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]], [[3.0, 3.0]]])
        >>> cu_inputs = torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> cu_tapes = torch.tensor([2, 3, 3], dtype=torch.int32)
        >>> ak.ops.elastic_attention(q, q, v, cu_inputs, cu_tapes)[:, 0].tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]

    Source: SPEC 6.
    """
    out, _ = attention_with_lse(
        q, k, v, cu_inputs, cu_tapes, max_rows=max_rows, softmax_scale=softmax_scale
    )
    return out


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Do what `elastic_attention` does, and return the log-sum-exp of the scores as well.

    Returns:
        What `elastic_attention` returns, and (num_heads, rows) float32, float64 for float64,
        through which no gradient flows.
    """
    found = _FORWARD.at_once(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
    if found is None:
        _check(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
        cu_inputs, cu_tapes = offsets_of_rows(q, cu_inputs, cu_tapes)
        found = _FORWARD.overload(q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale)
    return found


def _check(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    check_options(*options)
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 3 or dtype not in FLOAT_DTYPES or shape[2] == 0:
        raise ValueError(
            "q: expected floating-point of 16 to 64 bits (rows, num_heads, head_dim), "
            "head_dim at least 1, "
            f"got {dtype} {tuple(shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name}: expected {dtype} {tuple(shape)} on {device} like q, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def check_options(
    cu_inputs: Tensor, cu_tapes: Tensor, max_rows: int | None, softmax_scale: float | None
) -> None:
    """Raise TypeError if an argument beside q, k and v is of another type altogether."""
    check_tensor("cu_inputs", cu_inputs)
    check_tensor("cu_tapes", cu_tapes)
    if max_rows is not None:
        check_int("max_rows", max_rows)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)


def offsets_of_rows(rows: Tensor, cu_inputs: Tensor, cu_tapes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of a buffer's rows as int32, or raise ValueError if they are none."""
    check_offsets_tensor("cu_inputs", cu_inputs, rows)
    check_offsets_tensor("cu_tapes", cu_tapes, rows)
    if cu_tapes.shape != cu_inputs.shape:
        raise ValueError(
            f"cu_tapes: expected {tuple(cu_inputs.shape)} like cu_inputs, "
            f"got {tuple(cu_tapes.shape)}"
        )
    return as_int32("cu_inputs", cu_inputs), as_int32("cu_tapes", cu_tapes)


def no_tapes(cu_inputs: Tensor) -> Tensor:
    """Return the bounds of tapes of no rows, which follow the last input row."""
    return cu_inputs[-1:].expand(cu_inputs.shape)


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(num_heads, rows, dtype=wide_dtype(q.dtype))


def _fake_bwd(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> None:
    check_examples(cu_inputs, cu_tapes, len(q), max_rows)


def _check_values_bwd(
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
) -> None:
    check_examples(cu_inputs, cu_tapes, len(q), max_rows)


def _typical(head_dim: int, max_rows: int | None) -> Any:
    """Return what makes a call of three examples with three heads."""
    return lambda dtype: (
        *(meta(600, 3, head_dim, dtype=dtype) for _ in range(3)),
        *(meta(4, dtype=torch.int32) for _ in range(2)),
        *(max_rows, None),
    )


def _typical_bwd(head_dim: int, max_rows: int | None) -> Any:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, cu_inputs, cu_tapes, *options = _typical(head_dim, max_rows)(dtype)
        lse = meta(3, 600, dtype=wide_dtype(dtype))
        return q, q, k, v, q, lse, cu_inputs, cu_tapes, *options

    return make


def typical_calls(make: Any) -> dict[str, Any]:
    """Return calls by description, where make(head_dim, max_rows) returns what makes one."""
    return {
        "heads of 64, max_rows up to 256": make(64, 256),
        "heads of 64, max_rows up to 512": make(64, 512),
        "heads of 64, max_rows unknown or longer": make(64, None),
        "heads of up to 256": make(128, 256),
        "wider heads": make(320, 256),
    }


_FORWARD = Operation(
    "elastic_attention(Tensor q, Tensor k, Tensor v, Tensor cu_inputs, Tensor cu_tapes, "
    "SymInt? max_rows, float? softmax_scale) -> (Tensor out, Tensor lse)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.elastic_attention,
        "cuda": compiled.cuda_forward,
    },
    typical=typical_calls(_typical),
    check_arguments=attention_checks.elastic_attention,
    check_values=_check_values,
    int32=("cu_inputs", "cu_tapes"),
)
without_tapes = at_once_in_form(
    _FORWARD,
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_inputs, Tensor? cu_tapes, "
    "SymInt? max_rows, float? softmax_scale) -> (Tensor out, Tensor lse)",
    int32=("cu_inputs",),
)
"""Takes the op's arguments, cu_tapes being None where no example has tape rows; returns what
`Operation.at_once` does."""
_BACKWARD = Operation(
    "elastic_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_inputs, Tensor cu_tapes, SymInt? max_rows, float? softmax_scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.elastic_attention_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical=typical_calls(_typical_bwd),
    check_arguments=attention_checks.elastic_attention_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_inputs, cu_tapes, ctx.max_rows, ctx.softmax_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_inputs, cu_tapes)
    ctx.set_materialize_grads(False)  # lse has none


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple:
    *saved, cu_inputs, cu_tapes = ctx.saved_tensors
    offsets = cu_inputs, no_tapes(cu_inputs) if cu_tapes is None else cu_tapes
    grads = _BACKWARD.overload(dout, *saved, *offsets, ctx.max_rows, ctx.softmax_scale)
    return *grads, None, None, None, None


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    *tensors, _, softmax_scale = inputs
    return reference.elastic_attention(*tensors, softmax_scale=softmax_scale)


def _gradients(
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
) -> tuple[Tensor, ...]:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = reference.elastic_attention(
            q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale
        )
        return out

    return gradient_of(attended, (q, k, v), (dout,))


def _closed_form(
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
) -> tuple[Tensor, ...]:
    offsets = cu_inputs, cu_tapes
    out, lse = reference.elastic_attention(q, k, v, *offsets, softmax_scale=softmax_scale)
    return reference.elastic_attention_bwd(dout, q, k, v, out, lse, *offsets, softmax_scale)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients, _closed_form)


@flop_formula(torch.ops.adatape.elastic_attention, get_raw=True)
def _flops(
    q: Tensor, k: Tensor, v: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, *rest: Any, **kw: Any
) -> int:
    """Two products of 2 · L² · head_dim a head and example, over the rows that exist."""
    return flops_of(q.shape[1] * q.shape[2], cu_inputs, cu_tapes)


def flops_of(features: int, cu_inputs: Tensor, cu_tapes: Tensor) -> int:
    """Return the FLOPs of a forward pass over rows of so many features in all heads together."""
    lens = (cu_inputs.diff() + cu_tapes.diff()).long()
    return 4 * features * int(lens.square().sum())


@flop_formula(torch.ops.adatape.elastic_attention_bwd, get_raw=True)
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
