"""The gradients of `tape_gather` in Triton: a dot product a weight, a segment sum for the bank."""

import torch
from torch import Tensor

from adatape_kernels.ops.triton_reading import offsets_of
from adatape_kernels.ops.triton_runtime import kernel
from adatape_kernels.ops.triton_segment_sum import segment_sum
from adatape_kernels.ops.triton_specialization import with_dense_rows
from adatape_kernels.ops.triton_weight_gradients import no_places_yet, weight_gradients


@kernel()
def tape_gather_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; the bank's gradient is summed in a fixed order if torch asks for it."""
    bank_size = bank.shape[-2]
    if indices.numel() == 0 or bank.numel() == 0:
        return bank.new_zeros(*bank.shape), weights.new_zeros(*weights.shape)
    dtape, bank, indices = with_dense_rows(dtape), with_dense_rows(bank), indices.contiguous()
    offsets, _ = offsets_of(counts, indices, bank_size, checked=False)
    reads = no_places_yet(indices)
    dweights = weight_gradients(dtape, bank, indices, offsets, reads)
    dbank = segment_sum(
        dtape,
        reads.entries.view(-1) if bank.dim() == 2 else reads.entries,
        bank_size,
        bank.dtype,
        row_of=reads.row_of,
        weights=weights.contiguous(),
        ordered=torch.are_deterministic_algorithms_enabled(),
    )
    return dbank, dweights
