"""Residual addition and the LayerNorm that follows it, in one pass over the stream (SPEC 6).

total = x + branch        normed = weight · (total - mean) · rstd + bias
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels._triton import launch, tl, triton, vector
from adatape_kernels.backend import (
    current_backend,
    define_autograd,
    define_op,
    register,
    register_triton,
)
from adatape_kernels.reference import wide_dtype


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum for the next branch.

    Args:
        x: (rows, dim), dim at least 1; float32, float16, bfloat16 or float64.
        branch: the same shape, of any floating-point dtype.
        weight, bias: (dim,), dtype of x or float32: of the LayerNorm.
        eps: added to a row's variance.

    Returns:
        The sum and its LayerNorm, both (rows, dim) in the dtype of x. Statistics are float32
        (float64 for float64 x), of the sum as it is stored.

    Raises:
        ValueError: a shape, dtype or device differs from the above.

    Differentiable in x, branch, weight and bias.

    Source: SPEC 6.
    """
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            "x: expected floating-point (rows, dim), dim at least 1, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if branch.shape != x.shape or not branch.is_floating_point():
        raise ValueError(
            f"branch: expected floating-point {tuple(x.shape)} like x, "
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
    if x.device.type == "cpu" and current_backend() in (None, "eager", "cpp"):
        # Nothing is fused there: an op would cost its call, and hide the sum from the compiler.
        return reference.add_layer_norm(x, branch, weight, bias, eps)[:2]
    total, normed, _, _ = _add_layer_norm(x, branch, weight, bias, float(eps))
    return total, normed


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    stride_bm,
    num_rows,
    dim,
    eps,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take a block of rows, whole."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < num_rows
    mask_d = tl.max_constancy(offs_d < dim, VECTOR)
    mask = mask_m[:, None] & mask_d
    x_rows = tl.multiple_of(offs_m * stride_xm, VECTOR)
    branch_rows = tl.multiple_of(offs_m * stride_bm, VECTOR)
    rows = tl.multiple_of(offs_m * dim, VECTOR)
    x = tl.load(x_ptr + x_rows[:, None] + offs_d, mask, other=0.0)
    branch = tl.load(branch_ptr + branch_rows[:, None] + offs_d, mask, other=0.0)
    weight = tl.load(weight_ptr + offs_d, mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask_d, other=0.0).to(tl.float32)

    total = (x.to(tl.float32) + branch.to(tl.float32)).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + rows[:, None] + offs_d, total, mask)
    total = total.to(tl.float32)  # (BLOCK_M, BLOCK_D)
    mean = tl.sum(total, 1) / dim
    centred = tl.where(mask_d, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / dim + eps)
    normed = weight * (centred * rstd[:, None]) + bias
    tl.store(normed_ptr + rows[:, None] + offs_d, normed.to(normed_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + offs_m, mean, mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask_m)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dtotal_ptr,
    dnormed_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweights_ptr,
    dbiases_ptr,
    stride_tm,
    stride_nm,
    num_rows,
    dim,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take every so many blocks of rows, and leave this program's part of dweight and dbias.

    dx = dtotal + rstd · (g - mean(g) - y · mean(g · y)), with y as normalised, g = weight · dnormed
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = tl.max_constancy(offs_d < dim, VECTOR)
    weight = tl.load(weight_ptr + offs_d, mask_d, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < num_rows
        mask = mask_m[:, None] & mask_d
        dtotal_rows = tl.multiple_of(offs_m * stride_tm, VECTOR)
        dnormed_rows = tl.multiple_of(offs_m * stride_nm, VECTOR)
        rows = tl.multiple_of(offs_m * dim, VECTOR)
        total = tl.load(total_ptr + rows[:, None] + offs_d, mask, other=0.0).to(tl.float32)
        dnormed = tl.load(dnormed_ptr + dnormed_rows[:, None] + offs_d, mask, other=0.0)
        dtotal = tl.load(dtotal_ptr + dtotal_rows[:, None] + offs_d, mask, other=0.0)
        mean = tl.load(mean_ptr + offs_m, mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask_m, other=0.0)

        dnormed = dnormed.to(tl.float32)
        y = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)  # (BLOCK_M, BLOCK_D)
        g = weight * dnormed
        mean_g = tl.sum(g, 1) / dim
        mean_gy = tl.sum(g * y, 1) / dim
        dx = dtotal + rstd[:, None] * (g - mean_g[:, None] - y * mean_gy[:, None])
        tl.store(dx_ptr + rows[:, None] + offs_d, dx.to(dx_ptr.dtype.element_ty), mask)
        dweight += dnormed * y
        dbias += dnormed
    part = tl.program_id(0) * dim + offs_d
    tl.store(dweights_ptr + part, tl.sum(dweight, 0), mask_d)
    tl.store(dbiases_ptr + part, tl.sum(dbias, 0), mask_d)


# Widest row that one program holds in registers.
_MAX_DIM = 4096
# Programs of the backward, each of which leaves a part of the parameters' gradients.
_PARTS = 512


def _tile(dim: int) -> dict[str, int]:
    """Return the options of a program with 8 features a thread, which no width makes spill."""
    block_d = triton.next_power_of_2(dim)
    return {
        "BLOCK_M": max(1024 // block_d, 1),
        "BLOCK_D": block_d,
        "num_warps": max(block_d // 256, 4),
    }


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _triton_fwd(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dim = x.shape
    if dim > _MAX_DIM:
        return reference.add_layer_norm(x, branch, weight, bias, eps)
    x, branch = _dense_rows(x), _dense_rows(branch)
    total, normed = x.new_empty(rows, dim), x.new_empty(rows, dim)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    options = _tile(dim)
    launch(
        _add_layer_norm_fwd_kernel,
        (triton.cdiv(rows, options["BLOCK_M"]),),
        x,
        branch,
        weight.contiguous(),
        bias.contiguous(),
        total,
        normed,
        mean,
        rstd,
        x.stride(0),
        branch.stride(0),
        rows,
        dim,
        eps,
        VECTOR=vector(x, branch),
        **options,
    )
    return total, normed, mean, rstd


def _triton_bwd(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = total.shape
    if dim > _MAX_DIM:
        return reference.add_layer_norm_bwd(dtotal, dnormed, total, weight, mean, rstd)
    dtotal, dnormed = _dense_rows(dtotal), _dense_rows(dnormed)
    options = _tile(dim)
    parts = min(triton.cdiv(rows, options["BLOCK_M"]), _PARTS)
    dweights, dbiases = (total.new_empty(parts, dim, dtype=torch.float32) for _ in range(2))
    dx = total.new_empty(rows, dim)
    launch(
        _add_layer_norm_bwd_kernel,
        (parts,),
        dtotal,
        dnormed,
        total,
        weight.contiguous(),
        mean,
        rstd,
        dx,
        dweights,
        dbiases,
        dtotal.stride(0),
        dnormed.stride(0),
        rows,
        dim,
        VECTOR=vector(total, dtotal, dnormed),
        **options,
    )
    return dx, dweights.sum(0).to(weight.dtype), dbiases.sum(0).to(weight.dtype)


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


_add_layer_norm = define_op(
    "add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor total, Tensor normed, Tensor mean, Tensor rstd)",
    _fake,
)
_add_layer_norm_bwd = define_op(
    "add_layer_norm_bwd(Tensor dtotal, Tensor dnormed, Tensor total, Tensor weight, Tensor mean, "
    "Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)

register("add_layer_norm", "eager")(reference.add_layer_norm)
register("add_layer_norm_bwd", "eager")(reference.add_layer_norm_bwd)

register_triton("add_layer_norm")(_triton_fwd)
register_triton("add_layer_norm_bwd")(_triton_bwd)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.save_for_backward(total, weight, mean, rstd)


def _backward(ctx: Any, dtotal: Tensor, dnormed: Tensor, dmean: Any, drstd: Any) -> tuple:
    dx, dweight, dbias = _add_layer_norm_bwd(dtotal, dnormed, *ctx.saved_tensors)
    return dx, dx.to(ctx.branch_dtype), dweight, dbias.to(ctx.bias_dtype), None


define_autograd("add_layer_norm", _backward, _setup_context)
