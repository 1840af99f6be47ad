"""The gradient of `tape_read` in Triton: a bank's gradient is written once.

A bank of an example's own is filled with zeros, and then the rows that were read are written: their
keys by the program that goes back over the example's steps, the other features, if there are any,
by those that merge its tokens. For a bank that examples share, both list what a read adds, which is
summed by entry.
"""

import torch
from torch import Tensor

from adatape_kernels.ops.triton_key_gradients import TapeGradient, key_gradients
from adatape_kernels.ops.triton_reading import offsets_of
from adatape_kernels.ops.triton_runtime import kernel
from adatape_kernels.ops.triton_segment_sum import segment_sum
from adatape_kernels.ops.triton_specialization import with_dense_rows
from adatape_kernels.ops.triton_weight_gradients import (
    OwnBankGradient,
    no_places_yet,
    weight_gradients,
)


@kernel()
def tape_read_bwd(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; a shared bank's gradient is summed in order if torch asks for it."""
    (bank_size, dim), (batch, key_dim) = bank.shape[-2:], query.shape
    if indices.numel() == 0:
        return query.new_zeros(*query.shape), bank.new_zeros(*bank.shape)
    dtape, bank, indices = with_dense_rows(dtape), with_dense_rows(bank), indices.contiguous()
    weights, dweights = weights.contiguous(), dweights.contiguous()
    offsets, _ = offsets_of(counts, indices, bank_size, checked=False)
    chosen = indices, counts, average_query, loss_type
    if bank.dim() == 3:
        dbank = bank.new_zeros(batch, bank_size, dim)
        if key_dim < dim:
            own = OwnBankGradient(dbank, key_dim, weights)
            dweights = weight_gradients(dtape, bank, indices, offsets, own, given=dweights)
        tape = TapeGradient(dtape, weights, offsets)
        dquery = key_gradients(query, bank, dweights, dponder, *chosen, dbank, "store", tape)
        return dquery, dbank
    reads = no_places_yet(indices)
    dweights = weight_gradients(dtape, bank, indices, offsets, reads, given=dweights)
    dkeys = query.new_empty(indices.numel(), key_dim, dtype=torch.float32)
    keys = bank[..., :key_dim]
    dquery = key_gradients(query, keys, dweights, dponder, *chosen, dkeys, "list")
    dbank = segment_sum(
        dtape,
        reads.entries.view(-1),
        bank_size,
        bank.dtype,
        row_of=reads.row_of,
        weights=weights,
        leading=dkeys,
        ordered=torch.are_deterministic_algorithms_enabled(),
    )
    return dquery, dbank
