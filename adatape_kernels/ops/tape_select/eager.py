"""`tape_select` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.op_types import LossType
from adatape_kernels.ops.implementation import implementation
from adatape_kernels.ops.reading_checks import check_bank_lens, check_reads


@implementation(checks_values=True)
def forward(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: LossType,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring the reference's results into the order of the op's."""
    check_bank_lens(bank_lens, keys.shape[-2])
    selection = reference.tape_select(
        query,
        keys,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        average_query=average_query,
        loss_type=loss_type,
        read_mask=read_mask,
        bank_lens=bank_lens,
    )
    return selection.weights, selection.ponder, selection.indices, selection.counts


@implementation(checks_values=True)
def backward(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Look at counts and indices, on any device, then run the reference."""
    check_reads(keys, indices, counts, None)
    return reference.tape_select_bwd(
        query, keys, dweights, dponder, indices, counts, average_query, loss_type
    )
