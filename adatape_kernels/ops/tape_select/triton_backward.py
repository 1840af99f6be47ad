"""The gradient of `tape_select` in Triton: only the rows that were read are touched."""

import torch
from torch import Tensor

from adatape_kernels.ops.triton_key_gradients import key_gradients
from adatape_kernels.ops.triton_runtime import kernel
from adatape_kernels.ops.triton_segment_sum import segment_sum


@kernel()
def tape_select_bwd(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; examples that share a bank add to its gradient atomically.

    Under `torch.use_deterministic_algorithms` they list what they add, which is then summed in
    order.
    """
    num_tape_tokens = indices.shape[1]
    bank_size, key_dim = keys.shape[-2:]
    if keys.dim() == 3:
        drows, mode = keys.new_zeros(len(keys), bank_size, key_dim), "store"
    elif torch.are_deterministic_algorithms_enabled():
        drows, mode = query.new_empty(indices.numel(), key_dim, dtype=torch.float32), "list"
    else:
        drows, mode = query.new_zeros(bank_size, key_dim, dtype=torch.float32), "add"
    dquery = key_gradients(
        query, keys, dweights, dponder, indices, counts, average_query, loss_type, drows, mode
    )
    if mode == "list":
        used = torch.arange(num_tape_tokens, device=counts.device) < counts.unsqueeze(1)
        entries = indices.where(used.unsqueeze(-1), bank_size).flatten()
        return dquery, segment_sum(drows, entries, bank_size, keys.dtype)
    return dquery, drows.to(keys.dtype)
