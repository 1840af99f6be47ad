"""`accumulate_rows` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.ops.implementation import implementation

backward = implementation()(reference.accumulate_rows_bwd)


@implementation()
def forward(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> Tensor:
    """Run the reference."""
    return reference.accumulate_rows(total, rows, source, weights, total_weights=total_weights)


@implementation()
def in_place(
    total: Tensor, rows: Tensor, source: Tensor, weights: Tensor, total_weights: Tensor | None
) -> None:
    """Run the reference, and put what it returns in the place of the total."""
    total.copy_(
        reference.accumulate_rows(total, rows, source, weights, total_weights=total_weights)
    )
