"""Variable-length gathering: tape tokens of every example, packed with no gap (SPEC 4).

tape[offsets[i] + s] = Σ_j weights[i, s, j] · bank[indices[i, s, j]]   for s < counts[i]
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adatape_kernels import reference
from adatape_kernels.backend import define_autograd, define_op, register, register_compiled
from adatape_kernels.reference import wide_dtype


def tape_gather(
    bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    counts: Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the bank tokens of each read into tape tokens, packed example after example.

    Args:
        bank: (bank_size, dim), shared, or (batch, bank_size, dim); float32, float16, bfloat16 or
            float64.
        indices: (batch, num_tape_tokens, topk) int32 entries of the bank.
        weights: the same shape, float32 (float64 for a float64 bank).
        counts: (batch,) int32; rows of an example from there on are ignored.
        capacity: tape rows to return, used or not; None for exactly the used ones, which copies
            their number to the host.

    Returns:
        tape (total or capacity, dim), dtype of bank, accumulated in float32, zero in unused rows;
        and the offsets (batch + 1,) int32 of each example's rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, an index lies outside the
            bank, a count outside 0 to num_tape_tokens, or the capacity is too small.

    Differentiable in bank and weights. Under `torch.compile(fullgraph=True)` without a capacity,
    torch needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True`.

    Source: SPEC 4; scenic adatape/layers.py, ACTFunction.act_step.
    """
    if bank.dim() not in (2, 3) or not bank.is_floating_point():
        raise ValueError(
            "bank: expected floating-point ([batch,] bank_size, dim), "
            f"got {bank.dtype} {tuple(bank.shape)}"
        )
    if indices.dim() != 3 or indices.dtype != torch.int32:
        raise ValueError(
            "indices: expected int32 (batch, num_tape_tokens, topk), "
            f"got {indices.dtype} {tuple(indices.shape)}"
        )
    if bank.dim() == 3 and bank.shape[0] != indices.shape[0]:
        raise ValueError(
            f"bank: expected batch {indices.shape[0]} like indices, got {tuple(bank.shape)}"
        )
    if weights.shape != indices.shape or weights.dtype != wide_dtype(bank.dtype):
        raise ValueError(
            f"weights: expected {wide_dtype(bank.dtype)} {tuple(indices.shape)} like indices, "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    if counts.shape != indices.shape[:1] or counts.dtype != torch.int32:
        raise ValueError(
            f"counts: expected int32 ({indices.shape[0]},), "
            f"got {counts.dtype} {tuple(counts.shape)}"
        )
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected 0 or more tape rows, got {capacity}")
    for name, tensor in (("indices", indices), ("weights", weights), ("counts", counts)):
        if tensor.device != bank.device:
            raise ValueError(f"{name}: expected a tensor on {bank.device}, got {tensor.device}")
    return _tape_gather(bank, indices, weights, counts, capacity)


def _fake(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return bank.new_empty(rows, bank.shape[-1]), counts.new_empty(counts.shape[0] + 1)


def _fake_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return bank.new_empty(bank.shape), weights.new_empty(weights.shape)


_tape_gather = define_op(
    "tape_gather(Tensor bank, Tensor indices, Tensor weights, Tensor counts, SymInt? capacity) "
    "-> (Tensor tape, Tensor offsets)",
    _fake,
)
_tape_gather_bwd = define_op(
    "tape_gather_bwd(Tensor dtape, Tensor bank, Tensor indices, Tensor weights, Tensor counts) "
    "-> (Tensor dbank, Tensor dweights)",
    _fake_bwd,
)


@register("tape_gather", "eager")
def _eager(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    num_tape_tokens, bank_size = indices.shape[1], bank.shape[-2]
    if bool(((counts < 0) | (counts > num_tape_tokens)).any()):
        raise ValueError(f"counts: expected 0 to {num_tape_tokens}, got {counts.tolist()}")
    total = int(counts.sum())
    if capacity is not None and total > capacity:
        raise ValueError(f"capacity: expected at least the {total} tape rows read, got {capacity}")
    read = indices[torch.arange(num_tape_tokens, device=counts.device) < counts.unsqueeze(1)]
    outside = (read < 0) | (read >= bank_size)
    if bool(outside.any()):
        raise ValueError(
            f"indices: expected 0 to {bank_size - 1} (inside the bank) where read, "
            f"got {int(read[outside][0])}"
        )
    return reference.tape_gather(bank, indices, weights, counts, capacity=capacity)


register("tape_gather_bwd", "eager")(reference.tape_gather_bwd)


register_compiled("tape_gather")
register_compiled("tape_gather_bwd")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dtape: Tensor, doffsets: Any) -> tuple:
    dbank, dweights = _tape_gather_bwd(dtape, *ctx.saved_tensors)
    return dbank, None, dweights, None, None


define_autograd("tape_gather", _backward, _setup_context)


@register_flop_formula(torch.ops.adatape.tape_gather, get_raw=True)
def _flops(bank: Tensor, indices: Tensor, *rest: Any, out_val: tuple, **names: Any) -> int:
    """One multiply-add a feature and bank token that is merged."""
    return 2 * int(out_val[1][-1]) * indices.shape[2] * bank.shape[-1]


@register_flop_formula(torch.ops.adatape.tape_gather_bwd, get_raw=True)
def _flops_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, **names: Any
) -> int:
    """The same for the bank's gradient, and a dot product for each weight's."""
    return 4 * int(counts.sum()) * indices.shape[2] * bank.shape[-1]
