"""One read, from query to tape: `tape_select` and `tape_gather` with one gradient of the bank.

tape = tape_gather(bank, tape_select(query, bank[..., :key_dim]))

The keys are a slice of the bank. Composed by autograd, the gradient of that slice would be padded
to the bank's width and added to the values' gradient: two passes over a bank of which a read
touches a few rows. Here the keys' gradient is added to the leading features where it belongs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.arguments import check_tensor
from adatape_kernels.op_types import LossType, TapeSelection
from adatape_kernels.ops.fast_autograd import transforms_active
from adatape_kernels.ops.op import Composition
from adatape_kernels.ops.reading_checks import (
    check_capacity,
    check_selection,
    check_selection_types,
)
from adatape_kernels.ops.registration import flop_formula


def tape_read(
    query: Tensor,
    bank: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool = True,
    loss_type: LossType = "entropy",
    read_mask: Tensor | None = None,
    bank_lens: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, TapeSelection]:
    """Read bank entries for each example, and merge them into tape tokens.

    Args:
        query: (batch, key_dim); float32, float16, bfloat16 or float64; already normalised.
        bank: (bank_size, dim), shared, or (batch, bank_size, dim); dtype of query, already
            normalised; the first key_dim features of an entry are its key.
        num_tape_tokens, topk, halt_threshold, average_query, loss_type, read_mask, bank_lens: as
            in `tape_select`.
        capacity: as in `tape_gather`.

    Returns:
        tape (total or capacity, dim) and offsets (batch + 1,) as `tape_gather` returns them, and
        the selection as `tape_select` does.

    Raises:
        ValueError: a shape, dtype, device or value is not as the two ops say, of which the first
            has its keys from `bank`.
        TypeError: an argument is of another type altogether.

    Differentiable in query and bank, through tape, weights and ponder.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> tape, offsets, read = ak.ops.tape_read(
        ...     torch.ones(2, 4), torch.ones(9, 8), num_tape_tokens=3, topk=2, halt_threshold=1.0
        ... )
        >>> tape.shape, offsets.tolist(), read.counts.tolist()
        (torch.Size([4, 8]), [0, 2, 4], [2, 2])

    Source: SPEC 3 and 4.
    """
    check_selection_types(query, average_query, read_mask, bank_lens)
    check_tensor("bank", bank)
    _check_widths(query, bank)
    key_dim = query.shape[1]
    check_selection(
        query,
        bank[..., :key_dim],
        num_tape_tokens,
        topk,
        halt_threshold,
        loss_type,
        read_mask,
        bank_lens,
        name="bank",
    )
    check_capacity(capacity)
    options = (num_tape_tokens, topk, float(halt_threshold), average_query, loss_type)
    tape, weights, ponder, offsets, indices, counts = _READ.overload(
        query, bank, *options, read_mask, bank_lens, capacity
    )
    return tape, offsets, TapeSelection(indices, weights, counts, ponder)


def _check_widths(query: Tensor, bank: Tensor) -> None:
    """Refuse a bank that is too narrow to hold keys of the query's width."""
    if query.dim() != 2:
        raise ValueError(f"query: expected (batch, key_dim), got {tuple(query.shape)}")
    key_dim = query.shape[1]
    if bank.dim() not in (2, 3) or bank.shape[-1] < key_dim:
        raise ValueError(
            f"bank: expected ([batch,] bank_size, dim), dim at least key_dim = {key_dim}, "
            f"got {tuple(bank.shape)}"
        )


def _compose(query: Tensor, bank: Tensor, *options: Any) -> tuple[Tensor, ...]:
    _check_widths(query, bank)
    *select_options, capacity = options
    weights, ponder, indices, counts = torch.ops.adatape.tape_select(
        query, bank[..., : query.shape[1]], *select_options
    )
    tape, offsets = torch.ops.adatape.tape_gather(bank, indices, weights, counts, capacity)
    return tape, weights, ponder, offsets, indices, counts


_READ = Composition(
    "tape_read(Tensor query, Tensor bank, SymInt num_tape_tokens, SymInt topk, "
    "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
    "Tensor? bank_lens, SymInt? capacity) -> (Tensor tape, Tensor weights, Tensor ponder, "
    "Tensor offsets, Tensor indices, Tensor counts)",
    _compose,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, bank, _, _, _, ctx.average_query, ctx.loss_type, *_ = inputs
    _, weights, _, _, indices, counts = output
    ctx.save_for_backward(query, bank, weights, indices, counts)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dtape: Tensor | None, dweights: Tensor | None, dponder: Tensor | None, *rest: Any
) -> tuple:
    query, bank, weights, indices, counts = ctx.saved_tensors
    dbank = None
    if dtape is not None:
        dbank, dmerging = torch.ops.adatape.tape_gather_bwd(dtape, bank, indices, weights, counts)
        dweights = dmerging if dweights is None else dweights + dmerging
    dquery, dkeys = torch.ops.adatape.tape_select_bwd(
        query,
        bank[..., : query.shape[1]],
        torch.zeros_like(weights) if dweights is None else dweights,
        weights.new_zeros(len(query)) if dponder is None else dponder,
        indices,
        counts,
        ctx.average_query,
        ctx.loss_type,
    )
    further = bank.shape[-1] - query.shape[1]
    if dbank is None or torch.is_grad_enabled() or transforms_active():
        dkeys = F.pad(dkeys, (0, further)) if further else dkeys
        dbank = dkeys if dbank is None else dbank + dkeys
    elif further:
        dbank[..., : query.shape[1]] += dkeys
    else:
        dbank += dkeys
    return dquery, dbank, *[None] * 8


_READ.differentiable(_backward, _setup_context)


@flop_formula(torch.ops.adatape.tape_read, get_raw=True)
def _flops(
    query: Tensor,
    bank: Tensor,
    num_tape_tokens: int,
    topk: int,
    *rest: Any,
    out_val: tuple,
    **kw: Any,
) -> int:
    """A product of the query with every key for each step; one multiply-add a merged feature."""
    *_, counts = out_val
    return 2 * int(counts.sum()) * (bank.shape[-2] * query.shape[1] + topk * bank.shape[-1])
