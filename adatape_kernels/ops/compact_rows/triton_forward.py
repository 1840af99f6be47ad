"""`compact_rows` in Triton: a launch that numbers the rows kept, and one that copies them.

A program of the first counts all that is kept before its chunk by itself, so that programs wait for
nobody and need no atomics. At most 128 of them read 64 · rows bytes from the L2 cache together,
where the copy moves 2 · rows · dim elements to and from memory: for 768 features of 16 bits 2 % of
that. The last program's own reads are `rows` bytes one block after another, which at 32 · 197 rows
are two loads.
"""

from torch import Tensor

from adatape_kernels.ops.row_checks import check_kept
from adatape_kernels.ops.triton_runtime import kernel, launch, num_blocks, tl
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    elements_per_access,
    with_dense_rows,
)

BLOCK = 1024
"""Rows that a program numbers at a time."""
COUNTED = 4096
"""Rows that a program counts at a time."""
MOST_PROGRAMS = 128
BLOCK_R, BLOCK_D = 8, 256
"""Rows and features of a program that copies: a thread has two accesses of 16 bytes in flight at 16
bits a feature, and four at 32."""


@compiled_for()
def _compact_rows_prefix_kernel(
    keep_ptr,
    cu_tapes_ptr,
    before_ptr,
    order_ptr,
    batch,
    num_rows,
    chunk,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Write how many rows are kept before each of a chunk, and the number of each row kept.

    `before_ptr` (num_rows + 1,) ends with the number of all that are kept. `order_ptr` (num_rows,)
    has the rows kept in its first places, and nothing behind.
    """
    first = tl.program_id(0) * chunk
    used = tl.minimum(tl.maximum(tl.load(cu_tapes_ptr + batch), 0), num_rows)
    counted = tl.zeros((COUNTED,), tl.int32)
    for start in range(0, first, COUNTED):
        row = start + tl.arange(0, COUNTED)
        kept = tl.load(keep_ptr + row, row < tl.minimum(first, used), other=0) != 0
        counted += kept.to(tl.int32)
    before = tl.sum(counted, 0)
    for start in range(first, tl.minimum(first + chunk, num_rows), BLOCK):
        row = start + tl.arange(0, BLOCK)
        kept = tl.load(keep_ptr + row, row < used, other=0) != 0
        end = before + tl.cumsum(kept.to(tl.int32), 0)
        place = end - kept.to(tl.int32)
        tl.store(before_ptr + row, place, row < num_rows)
        tl.store(order_ptr + place, row, kept)
        before += tl.sum(kept.to(tl.int32), 0)
    if first + chunk >= num_rows:
        tl.store(before_ptr + num_rows, before)


@compiled_for(aligned=("data_ptr", "packed_ptr"))
def _compact_rows_copy_kernel(
    data_ptr,
    cu_inputs_ptr,
    cu_tapes_ptr,
    before_ptr,
    order_ptr,
    packed_ptr,
    kept_inputs_ptr,
    kept_tapes_ptr,
    source_ptr,
    stride_dm,
    num_offsets,
    num_rows,
    num_packed,
    dim,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy a block of rows to their places, and translate a block of offsets."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r = offs_r < num_packed
    used = offs_r < tl.load(before_ptr + num_rows)
    source = tl.load(order_ptr + offs_r, mask_r & used, other=-1)
    if tl.program_id(1) == 0:
        tl.store(source_ptr + offs_r, source, mask_r)
        mask_o = offs_r < num_offsets
        for_inputs = tl.load(cu_inputs_ptr + offs_r, mask_o, other=0)
        for_tapes = tl.load(cu_tapes_ptr + offs_r, mask_o, other=0)
        for_inputs = tl.minimum(tl.maximum(for_inputs, 0), num_rows)
        for_tapes = tl.minimum(tl.maximum(for_tapes, 0), num_rows)
        tl.store(kept_inputs_ptr + offs_r, tl.load(before_ptr + for_inputs, mask_o), mask_o)
        tl.store(kept_tapes_ptr + offs_r, tl.load(before_ptr + for_tapes, mask_o), mask_o)
    mask_d = tl.max_constancy(offs_d < dim, VECTOR)
    from_rows = tl.multiple_of(source.to(tl.int64) * stride_dm, VECTOR)
    to_rows = tl.multiple_of(offs_r.to(tl.int64) * dim, VECTOR)
    exists = (mask_r & used)[:, None] & mask_d
    values = tl.load(data_ptr + from_rows[:, None] + offs_d, exists, other=0.0)
    tl.store(packed_ptr + to_rows[:, None] + offs_d, values, mask_r[:, None] & mask_d)


@kernel()
def compact_rows(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels; without a capacity the number of rows kept comes to the host between."""
    num_rows, dim = data.shape
    data, cu_inputs, cu_tapes = with_dense_rows(data), cu_inputs.contiguous(), cu_tapes.contiguous()
    before, order = cu_inputs.new_empty(num_rows + 1), cu_inputs.new_empty(num_rows)
    chunk = BLOCK * max(num_blocks(num_rows, BLOCK * MOST_PROGRAMS), 1)
    launch(
        _compact_rows_prefix_kernel,
        (max(num_blocks(num_rows, chunk), 1),),
        keep_ptr=keep.contiguous(),
        cu_tapes_ptr=cu_tapes,
        before_ptr=before,
        order_ptr=order,
        batch=cu_tapes.shape[0] - 1,
        num_rows=num_rows,
        chunk=chunk,
        BLOCK=BLOCK,
        COUNTED=COUNTED,
        num_warps=4,
    )
    if capacity is None:
        check_kept(keep, cu_inputs, cu_tapes, num_rows, None)
    num_packed = capacity
    if num_packed is None:
        # A kernel that failed leaves any number here, which no size may follow beyond the rows.
        num_packed = min(max(int(before[num_rows]), 0), num_rows)
    packed, source = data.new_empty(num_packed, dim), order.new_empty(num_packed)
    kept_inputs, kept_tapes = (x.new_empty(x.shape[0]) for x in (cu_inputs, cu_tapes))
    rows_to_visit = max(num_packed, cu_inputs.shape[0])
    launch(
        _compact_rows_copy_kernel,
        (num_blocks(rows_to_visit, BLOCK_R), max(num_blocks(dim, BLOCK_D), 1)),
        data_ptr=data,
        cu_inputs_ptr=cu_inputs,
        cu_tapes_ptr=cu_tapes,
        before_ptr=before,
        order_ptr=order,
        packed_ptr=packed,
        kept_inputs_ptr=kept_inputs,
        kept_tapes_ptr=kept_tapes,
        source_ptr=source,
        stride_dm=data.stride(0),
        num_offsets=cu_inputs.shape[0],
        num_rows=num_rows,
        num_packed=num_packed,
        dim=dim,
        VECTOR=elements_per_access(data),
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return packed, kept_inputs, kept_tapes, source
