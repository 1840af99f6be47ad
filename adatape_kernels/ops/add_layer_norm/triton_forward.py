"""`add_layer_norm` in Triton: a program takes whole rows, and passes over them once."""

import torch
from torch import Tensor

from adatape_kernels.ops.add_layer_norm.triton_primitives import limits, tile
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    dense,
    elements_per_access,
    with_dense_rows,
)


@compiled_for(aligned=("x_ptr", "branch_ptr", "weight_ptr", "bias_ptr", "total_ptr", "normed_ptr"))
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

    # A branch in double precision is not rounded before the sum.
    wide = tl.float64 if branch_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = (x.to(wide) + branch.to(wide)).to(tl.float32).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + rows[:, None] + offs_d, total, mask)
    total = total.to(tl.float32)  # (BLOCK_M, BLOCK_D)
    mean = tl.sum(total, 1) / dim
    centred = tl.where(mask_d, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / dim + eps)
    normed = weight * (centred * rstd[:, None]) + bias
    tl.store(normed_ptr + rows[:, None] + offs_d, normed.to(normed_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + offs_m, mean, mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask_m)


@kernel(limits)
def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel."""
    num_rows, dim = x.shape
    x, branch = with_dense_rows(x), with_dense_rows(branch)
    total, normed = x.new_empty(num_rows, dim), x.new_empty(num_rows, dim)
    mean = x.new_empty(num_rows, dtype=torch.float32)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    options = tile(dim)
    launch(
        _add_layer_norm_fwd_kernel,
        (num_blocks(num_rows, options["BLOCK_M"]),),
        x_ptr=x,
        branch_ptr=branch,
        weight_ptr=dense(weight),
        bias_ptr=dense(bias),
        total_ptr=total,
        normed_ptr=normed,
        mean_ptr=mean,
        rstd_ptr=rstd,
        stride_xm=x.stride(0),
        stride_bm=branch.stride(0),
        num_rows=num_rows,
        dim=dim,
        eps=eps,
        VECTOR=elements_per_access(x, branch),
        **options,
    )
    return total, normed, mean, rstd
