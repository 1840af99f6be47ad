"""The gradient of `tape_read` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.op_types import LossType
from adatape_kernels.ops.implementation import implementation
from adatape_kernels.ops.reading_checks import check_reads, check_tape_rows


@implementation(checks_values=True)
def backward(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Look at counts and indices, on any device, then run the reference."""
    check_reads(bank, indices, counts, None)
    check_tape_rows(dtape, counts)
    return reference.tape_read_bwd(
        query, bank, dtape, dweights, dponder, weights, indices, counts, average_query, loss_type
    )
