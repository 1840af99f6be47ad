"""Adaptive tape reading: which bank tokens an example reads, and when it stops (SPEC 3).

while h < τ:   w = softmax(topk(q · keyᵀ) / √K)   h += w_0   p += 1 - Σ w²   q ← (q + Σ w key) / 2
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels.backend import define_autograd, define_op, register, register_compiled
from adatape_kernels.reference import LossType, TapeSelection, wide_dtype

MAX_TOPK = 32


def tape_select(
    query: Tensor,
    keys: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool = True,
    loss_type: LossType = "entropy",
    read_mask: Tensor | None = None,
    bank_lens: Tensor | None = None,
) -> TapeSelection:
    """Read bank entries for each example until its halting score reaches the threshold.

    Args:
        query: (batch, key_dim); float32, float16, bfloat16 or float64; already normalised.
        keys: (bank_size, key_dim), shared, or (batch, bank_size, key_dim); dtype of query.
        num_tape_tokens: most tape tokens an example may read.
        topk: bank entries merged into one tape token, 1 to 32.
        halt_threshold: an example reads on while its halting score is below this.
        average_query: the next query is the mean of the query and the merged key, not the latter.
        loss_type: what a step adds to the ponder loss: "entropy" 1 - Σ w², "max" 1 - max w.
        read_mask: (batch, bank_size) bool, True where an entry counts as read from the start.
        bank_lens: (batch,) integers; entries of an example's bank from there on do not exist.

    Returns:
        TapeSelection(indices, weights, counts, ponder): (batch, num_tape_tokens, topk) int32, -1
        where unread; the same shape in float32, 0 where unread; (batch,) int32; (batch,) float32.
        Float64 input gives float64 weights and ponder. Equal scores go to the lower index; NaN
        ranks below every number; an index is always inside the example's bank.

    Raises:
        ValueError: a shape, dtype, device or value differs from the above, or bank_size < topk.

    Differentiable in query and keys, through weights and ponder.

    Source: SPEC 3; scenic adatape/layers.py, ACTFunction.act_step.
    """
    if query.dim() != 2 or not query.is_floating_point() or query.shape[1] == 0:
        raise ValueError(
            "query: expected floating-point (batch, key_dim), key_dim at least 1, "
            f"got {query.dtype} {_shape(query)}"
        )
    batch, key_dim = query.shape
    if keys.dim() not in (2, 3) or keys.shape[-1] != key_dim:
        raise ValueError(f"keys: expected ([batch,] bank_size, {key_dim}), got {_shape(keys)}")
    if keys.dim() == 3 and keys.shape[0] != batch:
        raise ValueError(f"keys: expected batch {batch} like query, got {_shape(keys)}")
    if keys.dtype != query.dtype:
        raise ValueError(f"keys: expected {query.dtype} like query, got {keys.dtype}")
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk: expected 1 to {MAX_TOPK}, got {topk}")
    if keys.shape[-2] < topk:
        raise ValueError(
            f"keys: expected at least topk = {topk} bank entries, got {keys.shape[-2]}"
        )
    if num_tape_tokens < 0:
        raise ValueError(f"num_tape_tokens: expected 0 or more, got {num_tape_tokens}")
    if halt_threshold != halt_threshold:
        raise ValueError(f"halt_threshold: expected a number, got {halt_threshold}")
    if loss_type not in ("entropy", "max"):
        raise ValueError(f"loss_type: expected 'entropy' or 'max', got {loss_type!r}")
    if read_mask is not None and (
        read_mask.dtype != torch.bool or read_mask.shape != (batch, keys.shape[-2])
    ):
        raise ValueError(
            f"read_mask: expected bool ({batch}, {keys.shape[-2]}), "
            f"got {read_mask.dtype} {_shape(read_mask)}"
        )
    if bank_lens is not None and (
        bank_lens.dtype not in (torch.int32, torch.int64) or bank_lens.shape != (batch,)
    ):
        raise ValueError(
            f"bank_lens: expected int32 or int64 ({batch},), "
            f"got {bank_lens.dtype} {_shape(bank_lens)}"
        )
    for name, tensor in (("keys", keys), ("read_mask", read_mask), ("bank_lens", bank_lens)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device}, got {tensor.device}")
    weights, ponder, indices, counts = _tape_select(
        query,
        keys,
        num_tape_tokens,
        topk,
        float(halt_threshold),
        average_query,
        loss_type,
        read_mask,
        bank_lens,
    )
    return TapeSelection(indices, weights, counts, ponder)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _fake(
    query: Tensor, keys: Tensor, num_tape_tokens: int, topk: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, wide = query.shape[0], wide_dtype(query.dtype)
    return (
        query.new_empty(batch, num_tape_tokens, topk, dtype=wide),
        query.new_empty(batch, dtype=wide),
        query.new_empty(batch, num_tape_tokens, topk, dtype=torch.int32),
        query.new_empty(batch, dtype=torch.int32),
    )


def _fake_bwd(
    query: Tensor, keys: Tensor, dweights: Tensor, dponder: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


_tape_select = define_op(
    "tape_select(Tensor query, Tensor keys, SymInt num_tape_tokens, SymInt topk, "
    "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
    "Tensor? bank_lens) -> (Tensor weights, Tensor ponder, Tensor indices, Tensor counts)",
    _fake,
)
_tape_select_bwd = define_op(
    "tape_select_bwd(Tensor query, Tensor keys, Tensor dweights, Tensor dponder, Tensor indices, "
    "Tensor counts, bool average_query, str loss_type) -> (Tensor dquery, Tensor dkeys)",
    _fake_bwd,
)


@register("tape_select", "eager")
def _eager(
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
    if bank_lens is not None and bool(((bank_lens < 0) | (bank_lens > keys.shape[-2])).any()):
        raise ValueError(
            f"bank_lens: expected 0 to {keys.shape[-2]} (the bank's size), got {bank_lens.tolist()}"
        )
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


register("tape_select_bwd", "eager")(reference.tape_select_bwd)


register_compiled("tape_select")
register_compiled("tape_select_bwd")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, keys, _, _, _, ctx.average_query, ctx.loss_type, _, _ = inputs
    _, _, indices, counts = output
    ctx.save_for_backward(query, keys, indices, counts)


def _backward(ctx: Any, dweights: Tensor, dponder: Tensor, dindices: Any, dcounts: Any) -> tuple:
    query, keys, indices, counts = ctx.saved_tensors
    dquery, dkeys = _tape_select_bwd(
        query, keys, dweights, dponder, indices, counts, ctx.average_query, ctx.loss_type
    )
    return dquery, dkeys, None, None, None, None, None, None, None


define_autograd("tape_select", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.tape_select, get_raw=True)
def _flops(query: Tensor, keys: Tensor, *options: Any, out_val: tuple, **names: Any) -> int:
    """One product of the query with every key of the bank, for each step that an example takes."""
    steps = int(out_val[3].sum())
    return 2 * steps * keys.shape[-2] * keys.shape[-1]
