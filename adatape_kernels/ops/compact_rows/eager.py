"""`compact_rows` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.ops.implementation import implementation
from adatape_kernels.ops.row_checks import check_ascending, check_kept


@implementation(checks_values=True)
def forward(
    data: Tensor, keep: Tensor, cu_inputs: Tensor, cu_tapes: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look at the offsets and the number of rows kept, on any device, then run the reference."""
    check_kept(keep, cu_inputs, cu_tapes, len(data), capacity)
    return reference.compact_rows(data, keep, cu_inputs, cu_tapes, capacity=capacity)


@implementation(checks_values=True)
def backward(dpacked: Tensor, source: Tensor, rows: int) -> Tensor:
    """Look at the source, on any device, then run the reference."""
    check_ascending(source, rows)
    return reference.compact_rows_bwd(dpacked, source, rows)
