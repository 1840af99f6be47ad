"""What forward and backward of `accumulate_rows` in Triton share."""

from torch import Tensor

from adatape_kernels.ops.triton_runtime import DTYPES

BLOCK_R, BLOCK_D = 8, 256
"""Rows and features of a program's block."""


def why_not(rows: Tensor) -> str | None:
    """State which rows it adds to a total of float32: bfloat16 is not for the interpreter."""
    dtypes = DTYPES.get(rows.device.type)
    if dtypes is None or rows.dtype in dtypes:
        return None
    return f"it takes no rows of {rows.dtype} there"
