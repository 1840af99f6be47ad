"""Variable-length gathering: tape tokens of every example, packed with no gap (SPEC 4).

tape[offsets[i] + s] = Σ_j weights[i, s, j] · bank[indices[i, s, j]]   for s < counts[i]
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.arguments import check_tensor
from adatape_kernels.offsets import INTEGERS, as_int32, limited_to_int32
from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import op_checks
from adatape_kernels.ops.fast_autograd import dynamic_size
from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import Operation, meta
from adatape_kernels.ops.reading_checks import check_capacity, check_reads, check_tape_rows
from adatape_kernels.ops.registration import flop_formula
from adatape_kernels.ops.second_derivative import gradient_of, twice_differentiable
from adatape_kernels.ops.tape_gather import compiled, eager, triton_backward, triton_forward


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
        indices: (batch, num_tape_tokens, topk) int32 or int64 entries of the bank.
        weights: the same shape, float32 (float64 for a float64 bank).
        counts: (batch,) int32 or int64; rows of an example from there on are ignored.
        capacity: tape rows to return, used or not; None for exactly the used ones, which copies
            their number to the host.

    Returns:
        tape (total or capacity, dim), dtype of bank, accumulated in float32, zero in unused rows;
        and the offsets (batch + 1,) int32 of each example's rows.

    Raises:
        ValueError: a shape, dtype or device differs from the above, an index lies outside the
            bank, a count outside 0 to num_tape_tokens, or the capacity is too small.
        TypeError: an argument is of another type altogether.

    With a capacity Triton's kernels on a GPU copy nothing to the host, so that no value is refused:
    an index outside the bank moves to the nearest entry, a count into 0 to num_tape_tokens, and
    rows beyond the capacity are dropped, which `offsets[-1] > capacity` shows.

    Differentiable in bank and weights.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> bank = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> indices = torch.tensor([[[0, 1]], [[1, 0]]], dtype=torch.int32)
        >>> weights = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
        >>> counts = torch.tensor([1, 1], dtype=torch.int32)
        >>> tape, offsets = ak.ops.tape_gather(bank, indices, weights, counts)
        >>> tape.tolist(), offsets.tolist()
        ([[2.0, 3.0], [3.0, 4.0]], [0, 1, 2])

    Source: SPEC 4; scenic adatape/layers.py, ACTFunction.act_step.
    """
    found = _FORWARD.at_once(bank, indices, weights, counts, capacity)
    if found is None:
        _check(bank, indices, weights, counts, capacity)
        # Indices of rows that were not read are ignored, so that any number may stand there.
        indices, counts = limited_to_int32(indices), as_int32("counts", counts)
        found = _FORWARD.overload(bank, indices, weights, counts, capacity)
    return found


def _check(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> None:
    check_tensor("bank", bank)
    check_tensor("indices", indices)
    check_tensor("weights", weights)
    check_tensor("counts", counts)
    bank_shape, shape, dtype = bank.shape, indices.shape, bank.dtype
    if len(bank_shape) not in (2, 3) or dtype not in FLOAT_DTYPES:
        raise ValueError(
            "bank: expected floating-point of 16 to 64 bits ([batch,] bank_size, dim), "
            f"got {dtype} {tuple(bank_shape)}"
        )
    if len(shape) != 3 or indices.dtype not in INTEGERS:
        raise ValueError(
            "indices: expected int32 or int64 (batch, num_tape_tokens, topk), "
            f"got {indices.dtype} {tuple(shape)}"
        )
    batch = shape[0]
    if len(bank_shape) == 3 and bank_shape[0] != batch:
        raise ValueError(f"bank: expected batch {batch} like indices, got {tuple(bank_shape)}")
    if weights.shape != shape or weights.dtype != wide_dtype(dtype):
        raise ValueError(
            f"weights: expected {wide_dtype(dtype)} {tuple(shape)} like indices, "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    if counts.shape != (batch,) or counts.dtype not in INTEGERS:
        raise ValueError(
            f"counts: expected int32 or int64 ({batch},), got {counts.dtype} {tuple(counts.shape)}"
        )
    check_capacity(capacity)
    device = bank.device
    for name, tensor in (("indices", indices), ("weights", weights), ("counts", counts)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {tensor.device}")


def _fake(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    rows = dynamic_size() if capacity is None else capacity
    return bank.new_empty(rows, bank.shape[-1]), counts.new_empty(counts.shape[0] + 1)


def _fake_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return bank.new_empty(bank.shape), weights.new_empty(weights.shape)


def _check_values(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> None:
    check_reads(bank, indices, counts, capacity)


def _check_values_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> None:
    check_reads(bank, indices, counts, None)
    check_tape_rows(dtape, counts)


def _typical(*bank: int) -> Any:
    """Return what makes a call of three examples with values (*bank, 384)."""
    return lambda dtype: (
        meta(*bank, 384, dtype=dtype),
        meta(3, 10, 5, dtype=torch.int32),
        meta(3, 10, 5, dtype=wide_dtype(dtype)),
        meta(3, dtype=torch.int32),
        None,
    )


def _typical_bwd(*bank: int) -> Any:
    return lambda dtype: (meta(17, 384, dtype=dtype), *_typical(*bank)(dtype)[:4])


_FORWARD = Operation(
    "tape_gather(Tensor bank, Tensor indices, Tensor weights, Tensor counts, SymInt? capacity) "
    "-> (Tensor tape, Tensor offsets)",
    _fake,
    {
        "eager": eager.forward,
        "cpp": compiled.cpp_forward,
        "triton": triton_forward.tape_gather,
        "cuda": compiled.cuda_forward,
    },
    typical={"banks of their own": _typical(3, 784), "a shared bank": _typical(10_000)},
    check_arguments=op_checks.tape_gather,
    check_values=_check_values,
    int32=("indices", "counts"),
)
_BACKWARD = Operation(
    "tape_gather_bwd(Tensor dtape, Tensor bank, Tensor indices, Tensor weights, Tensor counts) "
    "-> (Tensor dbank, Tensor dweights)",
    _fake_bwd,
    {
        "eager": eager.backward,
        "cpp": compiled.cpp_backward,
        "triton": triton_backward.tape_gather_bwd,
        "cuda": compiled.cuda_backward,
    },
    typical={"banks of their own": _typical_bwd(3, 784), "a shared bank": _typical_bwd(10_000)},
    check_arguments=op_checks.tape_gather_bwd,
    check_values=_check_values_bwd,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dtape: Tensor, doffsets: Any) -> tuple:
    dbank, dweights = _BACKWARD.overload(dtape, *ctx.saved_tensors)
    return dbank, None, dweights, None, None


def _plain_torch(inputs: tuple, output: tuple) -> tuple:
    *tensors, capacity = inputs
    return reference.tape_gather(*tensors, capacity=capacity)


def _gradients(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, ...]:
    def merged(bank: Tensor, weights: Tensor) -> Tensor:
        tape, _ = reference.tape_gather(bank, indices, weights, counts, capacity=len(dtape))
        return tape

    return gradient_of(merged, (bank, weights), (dtape,))


_FORWARD.differentiable(_backward, _setup_context, _plain_torch)
twice_differentiable(_BACKWARD, _gradients)


@flop_formula(torch.ops.adatape.tape_gather, get_raw=True)
def _flops(bank: Tensor, indices: Tensor, *rest: Any, out_val: tuple, **names: Any) -> int:
    """One multiply-add a feature and bank token that is merged."""
    _, offsets = out_val
    return 2 * int(offsets[-1]) * indices.shape[2] * bank.shape[-1]


@flop_formula(torch.ops.adatape.tape_gather_bwd, get_raw=True)
def _flops_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, **names: Any
) -> int:
    """The same for the bank's gradient, and a dot product for each weight's."""
    return 4 * int(counts.sum()) * indices.shape[2] * bank.shape[-1]
