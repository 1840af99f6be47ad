"""Checks of the arguments of reading, which `tape_select`, `tape_gather` and `tape_read` share."""

import torch
from torch import Tensor

from adatape_kernels.arguments import check_flag, check_int, check_number, check_tensor, shown
from adatape_kernels.offsets import INTEGERS
from adatape_kernels.ops.implementation import FLOAT_DTYPES

MAX_TOPK = 32

MOST_ROWS = torch.iinfo(torch.int32).max
"""Offsets, counts and the numbers of rows that they stand for are int32."""


def check_selection_types(
    query: Tensor,
    average_query: bool,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
) -> None:
    """Raise TypeError for what is no tensor or no flag at all, which torch's dispatcher refuses."""
    check_tensor("query", query)
    check_flag("average_query", average_query)
    if read_mask is not None:
        check_tensor("read_mask", read_mask)
    if bank_lens is not None:
        check_tensor("bank_lens", bank_lens)


def check_widths(query: Tensor, bank: Tensor) -> None:
    """Refuse a bank that cannot be cut, or is too narrow to hold keys of the query's width."""
    if query.dim() != 2:
        raise ValueError(f"query: expected (batch, key_dim), got {tuple(query.shape)}")
    key_dim = query.shape[1]
    if bank.dim() not in (2, 3) or bank.shape[-1] < key_dim:
        raise ValueError(
            f"bank: expected ([batch,] bank_size, dim), dim at least key_dim = {key_dim}, "
            f"got {tuple(bank.shape)}"
        )
    if bank.layout is not torch.strided:
        raise ValueError(f"bank: expected a tensor of layout torch.strided, got {bank.layout}")


def check_selection(
    query: Tensor,
    keys: Tensor,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    loss_type: str,
    read_mask: Tensor | None,
    bank_lens: Tensor | None,
    name: str = "keys",
) -> None:
    """Raise as `tape_select` says; `name` is what the caller calls the keys."""
    shape, keys_shape, dtype = query.shape, keys.shape, query.dtype
    if len(shape) != 2 or dtype not in FLOAT_DTYPES or shape[1] == 0:
        raise ValueError(
            "query: expected floating-point of 16 to 64 bits (batch, key_dim), key_dim at least 1, "
            f"got {dtype} {tuple(shape)}"
        )
    batch, key_dim = shape
    if len(keys_shape) not in (2, 3) or keys_shape[-1] != key_dim:
        raise ValueError(
            f"{name}: expected ([batch,] bank_size, {key_dim}), got {tuple(keys_shape)}"
        )
    if len(keys_shape) == 3 and keys_shape[0] != batch:
        raise ValueError(f"{name}: expected batch {batch} like query, got {tuple(keys_shape)}")
    if keys.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} like query, got {keys.dtype}")
    check_int("topk", topk, 1, MAX_TOPK)
    bank_size = keys_shape[-2]
    if bank_size < topk:
        raise ValueError(f"{name}: expected at least topk = {topk} bank entries, got {bank_size}")
    check_int("num_tape_tokens", num_tape_tokens)
    check_number("halt_threshold", halt_threshold, finite=False)
    if loss_type not in ("entropy", "max"):
        raise ValueError(f"loss_type: expected 'entropy' or 'max', got {shown(loss_type)}")
    if read_mask is not None and (
        read_mask.dtype != torch.bool or read_mask.shape != (batch, bank_size)
    ):
        raise ValueError(
            f"read_mask: expected bool ({batch}, {bank_size}), "
            f"got {read_mask.dtype} {tuple(read_mask.shape)}"
        )
    if bank_lens is not None and (bank_lens.dtype not in INTEGERS or bank_lens.shape != (batch,)):
        raise ValueError(
            f"bank_lens: expected int32 or int64 ({batch},), "
            f"got {bank_lens.dtype} {tuple(bank_lens.shape)}"
        )
    device = query.device
    for argument, tensor in ((name, keys), ("read_mask", read_mask), ("bank_lens", bank_lens)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{argument}: expected a tensor on {device}, got {tensor.device}")


def check_bank_lens(bank_lens: Tensor | None, bank_size: int) -> None:
    """Refuse lengths outside the bank; copies to the host."""
    if bank_lens is not None and bool(((bank_lens < 0) | (bank_lens > bank_size)).any()):
        raise ValueError(
            f"bank_lens: expected 0 to {bank_size} (the bank's size), got {bank_lens.tolist()}"
        )


def check_capacity(capacity: int | None) -> None:
    """Refuse what is no number of tape rows."""
    if capacity is not None:
        check_int("capacity", capacity)


def check_tape_rows(dtape: Tensor, counts: Tensor) -> None:
    """Refuse a gradient of fewer tape rows than were read; copies their number to the host."""
    total = int(counts.sum())
    if total > len(dtape):
        raise ValueError(f"dtape: expected at least the {total} tape rows read, got {len(dtape)}")


def check_reads(bank: Tensor, indices: Tensor, counts: Tensor, capacity: int | None) -> None:
    """Refuse corrupt counts and indices, and a capacity that is too small; copies to the host."""
    num_tape_tokens, bank_size = indices.shape[1], bank.shape[-2]
    if bool(((counts < 0) | (counts > num_tape_tokens)).any()):
        raise ValueError(f"counts: expected 0 to {num_tape_tokens}, got {counts.tolist()}")
    total = int(counts.sum())
    if total > MOST_ROWS:
        raise ValueError(f"counts: expected a sum of at most {MOST_ROWS}, got {total}")
    if capacity is not None and total > capacity:
        raise ValueError(f"capacity: expected at least the {total} tape rows read, got {capacity}")
    read = indices[torch.arange(num_tape_tokens, device=counts.device) < counts.unsqueeze(1)]
    outside = (read < 0) | (read >= bank_size)
    if bool(outside.any()):
        raise ValueError(
            f"indices: expected 0 to {bank_size - 1} (inside the bank) where read, "
            f"got {int(read[outside][0])}"
        )
