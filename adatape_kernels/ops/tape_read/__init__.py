"""One read, from query to tape: `tape_select` and `tape_gather` with one gradient of the bank.

tape = tape_gather(bank, tape_select(query, bank[..., :key_dim]))

The keys are a slice of the bank. Composed by autograd, the gradient of that slice would be padded
to the bank's width and added to the values' gradient: two more banks that are written and read, of
which a read touches a few rows. Here one op writes the bank's gradient, once. Of 256 banks of 784
entries of 384 features in bfloat16 it writes 154 MB, and moves some 30 MB for what was read; the
composition moves about 770 MB where the keys are as wide as the entries.

`tape_read_again` is for a bank whose rows can be made anew: its gradient goes to copies of the rows
that were read, and nothing as large as the bank is written or kept for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.op_types import LossType, TapeSelection, wide_dtype
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.composition import Composition
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.reading_checks import (
    check_capacity,
    check_reads,
    check_selection,
    check_selection_types,
    check_tape_rows,
    check_widths,
)
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable
from adatape_kernels.ops.tape_read import compiled, eager, triton_backward


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
    options = (num_tape_tokens, topk, halt_threshold, average_query, loss_type)
    found = _READ.at_once(query, bank, *options, read_mask, bank_lens, capacity)
    if found is None:
        check_selection_types(query, average_query, read_mask, bank_lens)
        check_tensor("bank", bank)
        check_widths(query, bank)
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
        found = _READ.overload(query, bank, *options, read_mask, bank_lens, capacity)
    tape, weights, ponder, offsets, indices, counts = found
    return tape, offsets, TapeSelection(indices, weights, counts, ponder)


def _compose(query: Tensor, bank: Tensor, *options: Any) -> tuple[Tensor, ...]:
    check_widths(query, bank)
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
    parts=("tape_select", "tape_gather"),
    kernel=compiled.cpp_forward,
)


def _fake_bwd(query: Tensor, bank: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), bank.new_empty(bank.shape)


def _check_values_bwd(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    *options: Any,
) -> None:
    check_reads(bank, indices, counts, None)
    check_tape_rows(dtape, counts)


def _typical_bwd(*bank: int) -> Any:
    """Return what makes a call of three examples with entries (*bank, 384), keys of 64 features."""
    return lambda dtype: (
        meta(3, 64, dtype=dtype),
        meta(*bank, 384, dtype=dtype),
        meta(17, 384, dtype=dtype),
        meta(3, 10, 5, dtype=wide_dtype(dtype)),
        meta(3, dtype=wide_dtype(dtype)),
        meta(3, 10, 5, dtype=wide_dtype(dtype)),
        meta(3, 10, 5, dtype=torch.int32),
        meta(3, dtype=torch.int32),
        *(True, "entropy"),
    )


_BACKWARD = Operation(
    "tape_read_bwd(Tensor query, Tensor bank, Tensor dtape, Tensor dweights, Tensor dponder, "
    "Tensor weights, Tensor indices, Tensor counts, bool average_query, str loss_type) "
    "-> (Tensor dquery, Tensor dbank)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.tape_read_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical={"banks of their own": _typical_bwd(3, 784), "a shared bank": _typical_bwd(10_000)},
    check_arguments=op_checks.tape_read_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, bank, _, _, _, ctx.average_query, ctx.loss_type, *_ = inputs
    _, weights, _, _, indices, counts = output
    ctx.save_for_backward(query, bank, weights, indices, counts)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dtape: Tensor | None, dweights: Tensor | None, dponder: Tensor | None, *rest: Any
) -> tuple:
    """Return the gradients of query and bank, and of what stands for the bank's rows alike."""
    query, bank, weights, indices, counts = ctx.saved_tensors
    dweights = torch.zeros_like(weights) if dweights is None else dweights
    dponder = weights.new_zeros(len(query)) if dponder is None else dponder
    options = ctx.average_query, ctx.loss_type
    if dtape is not None:
        dquery, dbank = _BACKWARD.overload(
            query, bank, dtape, dweights, dponder, weights, indices, counts, *options
        )
    else:
        dquery, dbank = torch.ops.adatape.tape_select_bwd(
            query, bank[..., : query.shape[1]], dweights, dponder, indices, counts, *options
        )
        dbank = F.pad(dbank, (0, bank.shape[-1] - query.shape[1]))
    return dquery, dbank, *[None] * 8


def _gradients(
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
) -> tuple[Tensor, ...]:
    def read(query: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
        keys = bank[..., : query.shape[1]]
        found = reference.read_along(query, keys, indices, counts, average_query, loss_type)
        tape, _ = reference.tape_gather(bank, indices, found[0], counts, capacity=len(dtape))
        return tape, *found

    return gradient_of(read, (query, bank), (dtape, dweights, dponder))


_READ.differentiable(_backward, _setup_context)
twice_differentiable(_BACKWARD, _gradients)


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
    """As `tape_select` and `tape_gather` count theirs."""
    *_, counts = out_val
    scored_and_merged = (bank.shape[-2] + topk) * query.shape[1]
    return 2 * int(counts.sum()) * (scored_and_merged + topk * bank.shape[-1])


@flop_formula(torch.ops.adatape.tape_read_bwd, get_raw=True)
def _flops_bwd(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    *options: Any,
    **names: Any,
) -> int:
    """As the gradients of `tape_gather` and of `tape_select` count theirs."""
    return 4 * int(counts.sum()) * indices.shape[2] * bank.shape[-1]


def tape_read_again(
    query: Tensor,
    rows: Tensor,
    bank: Tensor,
    selection: TapeSelection,
    *,
    average_query: bool,
    loss_type: LossType,
    capacity: int | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, TapeSelection]:
    """Return what `tape_read` does of a selection that was made, differentiable in copied rows.

    Args:
        query: as in `tape_read`, which the selection was made with.
        rows: (batch, steps · topk, dim), for the first steps of each example the bank's entries
            that were selected, in their order, as `rows_of_selection` says; finite numbers of any
            kind where nothing was. With `places`, whatever these point into.
        bank: (bank_size, dim), shared, or (batch, bank_size, dim), without a gradient.
        selection: that of `tape_select` by the bank's keys, without a gradient.
        average_query, loss_type, capacity: as in `tape_read`.
        places: where `rows` has each entry that was selected, if not in their order: those of
            the selection for rows that are the bank once more, shared or not, with a gradient.

    Returns:
        As `tape_read`. The values are those of the bank; the rows are for the gradient alone.

    Differentiable in query and rows, through tape, weights and ponder.

    Source: SPEC 3 and 4.
    """
    check_capacity(capacity)
    indices, weights, counts, ponder = selection
    places = _places_in_order(indices) if places is None else places
    options = average_query, loss_type, capacity
    tape, weights, ponder, offsets = _READ_AGAIN.overload(
        query, rows, bank, places, indices, weights, ponder, counts, *options
    )
    return tape, offsets, TapeSelection(indices, weights, counts, ponder)


def _compose_again(
    query: Tensor,
    rows: Tensor,
    bank: Tensor,
    places: Tensor,
    indices: Tensor,
    weights: Tensor,
    ponder: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: str,
    capacity: int | None,
) -> tuple[Tensor, ...]:
    tape, offsets = torch.ops.adatape.tape_gather(bank, indices, weights, counts, capacity)
    return tape, weights.clone(), ponder.clone(), offsets


_READ_AGAIN = Composition(
    "tape_read_again(Tensor query, Tensor rows, Tensor bank, Tensor places, Tensor indices, "
    "Tensor weights, Tensor ponder, Tensor counts, bool average_query, str loss_type, "
    "SymInt? capacity) -> (Tensor tape, Tensor read_weights, Tensor read_ponder, Tensor offsets)",
    _compose_again,
)


def _places_in_order(indices: Tensor) -> Tensor:
    """Return where copies in the order of indices are, int32 of the shape of indices."""
    batch, num_tape_tokens, topk = indices.shape
    places = torch.arange(num_tape_tokens * topk, dtype=torch.int32, device=indices.device)
    return places.view(1, num_tape_tokens, topk).repeat(batch, 1, 1)


def _setup_context_again(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, rows, _, places, _, _, _, counts, ctx.average_query, ctx.loss_type, _ = inputs
    _, weights, _, _ = output  # not those of the inputs, which have no derivative
    ctx.save_for_backward(query, rows, weights, places, counts)
    ctx.set_materialize_grads(False)


def _plain_torch_again(inputs: tuple, output: tuple) -> tuple:
    query, rows, _, places, _, _, _, counts, average_query, loss_type, _ = inputs
    keys = rows[..., : query.shape[1]]
    weights, ponder = reference.read_along(query, keys, places, counts, average_query, loss_type)
    tape, _ = reference.tape_gather(rows, places, weights, counts, capacity=len(output[0]))
    return tape, weights, ponder, None


def _backward_again(ctx: Any, *grads: Tensor | None) -> tuple:
    return *_backward(ctx, *grads), None


_READ_AGAIN.differentiable(_backward_again, _setup_context_again, _plain_torch_again)


@flop_formula(torch.ops.adatape.tape_read_again, get_raw=True)
def _flops_again(
    query: Tensor,
    rows: Tensor,
    bank: Tensor,
    places: Tensor,
    indices: Tensor,
    weights: Tensor,
    ponder: Tensor,
    counts: Tensor,
    *options: Any,
    **names: Any,
) -> int:
    """As `tape_gather` counts them."""
    return 2 * int(counts.sum()) * indices.shape[2] * bank.shape[-1]
