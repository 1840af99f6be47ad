"""The gradients of `add_layer_norm` in Triton, the parameters' as sums of the programs' parts."""

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

# Most programs of a launch, each of which leaves a part of the parameters' gradients.
_MAX_PARTS = 512


@compiled_for(
    aligned=(
        "dtotal_ptr",
        "dnormed_ptr",
        "total_ptr",
        "weight_ptr",
        "dx_ptr",
        "dweights_ptr",
        "dbiases_ptr",
    )
)
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
    part = tl.multiple_of(tl.program_id(0) * dim, VECTOR) + offs_d
    tl.store(dweights_ptr + part, tl.sum(dweight, 0), mask_d)
    tl.store(dbiases_ptr + part, tl.sum(dbias, 0), mask_d)


@kernel(limits)
def add_layer_norm_bwd(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel, and add up the parts."""
    num_rows, dim = total.shape
    dtotal, dnormed = with_dense_rows(dtotal), with_dense_rows(dnormed)
    total = dense(total)
    options = tile(dim)
    parts = min(num_blocks(num_rows, options["BLOCK_M"]), _MAX_PARTS)
    dweights = total.new_empty(parts, dim, dtype=torch.float32)
    dbiases = total.new_empty(parts, dim, dtype=torch.float32)
    dx = total.new_empty(num_rows, dim)
    launch(
        _add_layer_norm_bwd_kernel,
        (parts,),
        dtotal_ptr=dtotal,
        dnormed_ptr=dnormed,
        total_ptr=total,
        weight_ptr=dense(weight),
        mean_ptr=mean.contiguous(),
        rstd_ptr=rstd.contiguous(),
        dx_ptr=dx,
        dweights_ptr=dweights,
        dbiases_ptr=dbiases,
        stride_tm=dtotal.stride(0),
        stride_nm=dnormed.stride(0),
        num_rows=num_rows,
        dim=dim,
        VECTOR=elements_per_access(total, dtotal, dnormed),
        **options,
    )
    return dx, dweights.sum(0).to(weight.dtype), dbiases.sum(0).to(weight.dtype)
