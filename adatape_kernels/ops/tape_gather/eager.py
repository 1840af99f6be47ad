"""`tape_gather` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.ops.implementation import implementation
from adatape_kernels.ops.reading_checks import check_reads, check_tape_rows


@implementation(checks_values=True)
def forward(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Look at counts and indices, on any device, then run the reference."""
    check_reads(bank, indices, counts, capacity)
    return reference.tape_gather(bank, indices, weights, counts, capacity=capacity)


@implementation(checks_values=True)
def backward(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Look at counts and indices, on any device, then run the reference."""
    check_reads(bank, indices, counts, None)
    check_tape_rows(dtape, counts)
    return reference.tape_gather_bwd(dtape, bank, indices, weights, counts)
