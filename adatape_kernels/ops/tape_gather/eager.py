"""`tape_gather` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.ops.implementation import implementation
from adatape_kernels.ops.reading_checks import check_reads


@implementation(checks_values=True)
def forward(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Look at counts and indices, on any device, then run the reference."""
    check_reads(bank, indices, counts, capacity)
    return reference.tape_gather(bank, indices, weights, counts, capacity=capacity)


backward = implementation()(reference.tape_gather_bwd)
