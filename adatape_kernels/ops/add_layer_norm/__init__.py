"""Residual addition and the LayerNorm that follows it, in one pass over the stream (SPEC 6).

total = x + branch        normed = weight · (total - mean) · rstd + bias
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_number, check_tensor
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.add_layer_norm import compiled, eager, triton_backward, triton_forward
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum for the next branch.

    Args:
        x: (rows, dim), dim at least 1; float32, float16, bfloat16 or float64.
        branch: the same shape; float32, float16, bfloat16 or float64, whichever x has.
        weight, bias: (dim,), dtype of x or float32: of the LayerNorm.
        eps: added to a row's variance.

    Returns:
        The sum and its LayerNorm, both (rows, dim) in the dtype of x. Statistics are float32
        (float64 for float64 x), of the sum as it is stored.

    Raises:
        ValueError: a shape, dtype or device differs from the above, or eps is negative.
        TypeError: an argument is of another type altogether.

    Differentiable in x, branch, weight and bias.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> x, branch = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> total, normed = ak.ops.add_layer_norm(x, branch, torch.ones(2), torch.zeros(2))
        >>> total.tolist(), normed.round().tolist()
        ([[1.0, 3.0]], [[-1.0, 1.0]])

    Source: SPEC 6.
    """
    found = _FORWARD.at_once(x, branch, weight, bias, eps)
    if found is None:
        _check(x, branch, weight, bias, eps)
        found = _FORWARD.overload(x, branch, weight, bias, float(eps))
    total, normed, _, _ = found
    return total, normed


def _check(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_tensor("x", x)
    check_tensor("branch", branch)
    check_tensor("weight", weight)
    check_tensor("bias", bias)
    check_number("eps", eps, 0)
    if x.dim() != 2 or x.shape[1] == 0 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            "x: expected floating-point of 16 to 64 bits (rows, dim), dim at least 1, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if branch.shape != x.shape or branch.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"branch: expected floating-point of 16 to 64 bits {tuple(x.shape)} like x, "
            f"got {branch.dtype} {tuple(branch.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:] or parameter.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"{name}: expected {x.dtype} or float32 ({x.shape[1]},) to fit x, "
                f"got {parameter.dtype} {tuple(parameter.shape)}"
            )
    for name, tensor in (("branch", branch), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {tensor.device}")


def _fake(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _fake_bwd(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _typical(dim: int) -> Any:
    return lambda dtype: (
        meta(50, dim, dtype=dtype),
        meta(50, dim, dtype=dtype),
        meta(dim, dtype=dtype),
        meta(dim, dtype=dtype),
        1e-6,
    )


def _typical_bwd(dim: int) -> Any:
    return lambda dtype: (
        *(meta(50, dim, dtype=dtype) for _ in range(3)),
        meta(dim, dtype=dtype),
        *(meta(50, dtype=wide_dtype(dtype)) for _ in range(2)),
    )


_FORWARD = Operation(
    "add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor total, Tensor normed, Tensor mean, Tensor rstd)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.add_layer_norm,
    },
    typical={"up to 4,096 features": _typical(384), "more features": _typical(8192)},
    check_arguments=op_checks.add_layer_norm,
)
_BACKWARD = Operation(
    "add_layer_norm_bwd(Tensor dtotal, Tensor dnormed, Tensor total, Tensor weight, Tensor mean, "
    "Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.add_layer_norm_bwd,
    },
    typical={"up to 4,096 features": _typical_bwd(384), "more features": _typical_bwd(8192)},
    check_arguments=op_checks.add_layer_norm_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.save_for_backward(total, weight, mean, rstd)


def _backward(ctx: Any, dtotal: Tensor, dnormed: Tensor, dmean: Any, drstd: Any) -> tuple:
    total, weight, mean, rstd = ctx.saved_tensors
    # The backward op rounds both gradients to its weight's dtype, so that is the wider of the two.
    wider = weight.to(torch.promote_types(weight.dtype, ctx.bias_dtype))
    dx, dweight, dbias = _BACKWARD.overload(dtotal, dnormed, total, wider, mean, rstd)
    return (
        *(dx, dx.to(ctx.branch_dtype)),
        *(dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)),
        None,
    )


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    """Compute what torch's own LayerNorm does, whose mean and deviation have no tangents."""
    x, branch, weight, bias, eps = inputs
    total, wide = (x + branch).to(x.dtype), wide_dtype(x.dtype)
    variance, mean = torch.var_mean(total.to(wide), -1, correction=0)
    rstd = (variance + eps).rsqrt()
    normed = weight * (total - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) + bias
    return total, normed, mean, rstd


def _gradients(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(total.dtype)

    def normed(total: Tensor, weight: Tensor) -> Tensor:
        y, _ = _standardised(total.to(wide), rstd)
        return weight.to(wide) * y

    dx, dweight = gradient_of(normed, (total, weight), (dnormed.to(wide),))
    return dtotal + dx, dweight, dnormed.to(wide).sum(0).to(weight.dtype)


def _standardised(total: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return total with mean 0 and variance 1, and rstd (rows, 1), as functions of total."""
    variance = total.var(-1, correction=0)
    eps = (rstd**-2 - variance).detach()
    rstd = (variance + eps).rsqrt().unsqueeze(-1)
    return (total - total.mean(-1, keepdim=True)) * rstd, rstd


def _closed_form(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the reference's formula, which torch's own op for it does not differentiate fully."""
    y, rstd = _standardised(total.to(mean.dtype), rstd)
    dnormed = dnormed.to(mean.dtype)
    g = weight * dnormed
    dx = dtotal + rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    return dx, (dnormed * y).sum(0), dnormed.sum(0)


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients, _closed_form)
