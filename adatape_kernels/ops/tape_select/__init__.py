"""Adaptive tape reading: which bank tokens an example reads, and when it stops (SPEC 3).

while h < τ:   w = softmax(topk(q · keyᵀ) / √K)   h += w_0   p += 1 - Σ w²   q ← (q + Σ w key) / 2
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.op_types import LossType, TapeSelection, wide_dtype
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.reading_checks import (
    check_bank_lens,
    check_reads,
    check_selection,
    check_selection_types,
)
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable
from adatape_kernels.ops.tape_select import compiled, eager, triton_backward, triton_forward
from adatape_kernels.ops.tape_select.outputs import SelectOutputs, empty_outputs


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
        TypeError: an argument is of another type altogether.

    Differentiable in query and keys, through weights and ponder.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> query, keys = torch.tensor([[1.0, 0.0]]), torch.eye(2).repeat(3, 1)
        >>> read = ak.ops.tape_select(
        ...     query, keys, num_tape_tokens=3, topk=2, halt_threshold=1.0
        ... )
        >>> read.indices.tolist()  # equal scores go to the lower index
        [[[0, 2], [4, 1], [-1, -1]]]
        >>> read.counts.tolist()
        [2]

    Source: SPEC 3; scenic adatape/layers.py, ACTFunction.act_step.
    """
    options = (num_tape_tokens, topk, halt_threshold, average_query, loss_type)
    found = _FORWARD.at_once(query, keys, *options, read_mask, bank_lens)
    if found is None:
        check_selection_types(query, average_query, read_mask, bank_lens)
        check_tensor("keys", keys)
        check_selection(
            query, keys, num_tape_tokens, topk, halt_threshold, loss_type, read_mask, bank_lens
        )
        options = (num_tape_tokens, topk, float(halt_threshold), average_query, loss_type)
        found = _FORWARD.overload(query, keys, *options, read_mask, bank_lens)
    weights, ponder, indices, counts = found
    return TapeSelection(indices, weights, counts, ponder)


def _fake(
    query: Tensor, keys: Tensor, num_tape_tokens: int, topk: int, *options: Any
) -> SelectOutputs:
    return empty_outputs(query, num_tape_tokens, topk)


def _fake_bwd(
    query: Tensor, keys: Tensor, dweights: Tensor, dponder: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _check_values(query: Tensor, keys: Tensor, *options: Any) -> None:
    check_bank_lens(options[-1], keys.shape[-2])


def _check_values_bwd(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    *options: Any,
) -> None:
    check_reads(keys, indices, counts, None)


def _typical(*bank: int) -> Any:
    """Return what makes a call of three examples with keys (*bank, 64)."""
    return lambda dtype: (
        meta(3, 64, dtype=dtype),
        meta(*bank, 64, dtype=dtype),
        *(10, 5, 2.0, True, "entropy", None, None),
    )


def _typical_bwd(*bank: int) -> Any:
    return lambda dtype: (
        meta(3, 64, dtype=dtype),
        meta(*bank, 64, dtype=dtype),
        meta(3, 10, 5, dtype=wide_dtype(dtype)),
        meta(3, dtype=wide_dtype(dtype)),
        meta(3, 10, 5, dtype=torch.int32),
        meta(3, dtype=torch.int32),
        *(True, "entropy"),
    )


_FORWARD = Operation(
    "tape_select(Tensor query, Tensor keys, SymInt num_tape_tokens, SymInt topk, "
    "float halt_threshold, bool average_query, str loss_type, Tensor? read_mask, "
    "Tensor? bank_lens) -> (Tensor weights, Tensor ponder, Tensor indices, Tensor counts)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.tape_select,
        "cuda": compiled.cuda_forward,
    },
    typical={"banks of their own": _typical(3, 784), "a shared bank": _typical(10_000)},
    check_arguments=op_checks.tape_select,
    check_values=_check_values,
)
_BACKWARD = Operation(
    "tape_select_bwd(Tensor query, Tensor keys, Tensor dweights, Tensor dponder, Tensor indices, "
    "Tensor counts, bool average_query, str loss_type) -> (Tensor dquery, Tensor dkeys)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.tape_select_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical={"banks of their own": _typical_bwd(3, 784), "a shared bank": _typical_bwd(10_000)},
    check_arguments=op_checks.tape_select_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, keys, _, _, _, ctx.average_query, ctx.loss_type, _, _ = inputs
    _, _, indices, counts = output
    ctx.save_for_backward(query, keys, indices, counts)


def _backward(ctx: Any, dweights: Tensor, dponder: Tensor, dindices: Any, dcounts: Any) -> tuple:
    query, keys, indices, counts = ctx.saved_tensors
    dquery, dkeys = _BACKWARD.overload(
        query, keys, dweights, dponder, indices, counts, ctx.average_query, ctx.loss_type
    )
    return dquery, dkeys, None, None, None, None, None, None, None


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    query, keys, _, _, _, average_query, loss_type, _, _ = inputs
    _, _, indices, counts = output
    weights, ponder = reference.read_along(query, keys, indices, counts, average_query, loss_type)
    return weights, ponder, None, None


def _gradients(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, ...]:
    def read(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return reference.read_along(query, keys, indices, counts, average_query, loss_type)

    return gradient_of(read, (query, keys), (dweights, dponder))


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients)


@flop_formula(torch.ops.adatape.tape_select, get_raw=True)
def _flops(query: Tensor, keys: Tensor, *options: Any, out_val: tuple, **names: Any) -> int:
    """For each step one product of the query with every key, and one of the keys that it merges."""
    indices, _, _, counts = out_val
    return 2 * int(counts.sum()) * (keys.shape[-2] + indices.shape[-1]) * keys.shape[-1]
