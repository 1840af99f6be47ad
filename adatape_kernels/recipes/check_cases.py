"""What `check` asks of every kernel: ops at shapes that reach each kernel of each backend.

Each case makes its inputs from torch's generator, on the default device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops
from adatape_kernels.offsets import cumulative
from adatape_kernels.op_types import ACTIVATIONS, Activation
from adatape_kernels.ops import FFN

Results = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Differentiable results, and those that must be equal."""


class CheckCase(NamedTuple):
    """An op at one shape."""

    op: str
    name: str
    inputs: Callable[[], list[Tensor]]
    """Makes the differentiable inputs, float32 on the default device."""
    call: Callable[..., Results]
    deterministic: bool = False
    """Whether torch is asked for deterministic algorithms, for which some backwards have others."""


def check_cases() -> Iterator[CheckCase]:
    """Yield every case."""
    for bank, batch, size, key_dim, topk, num_tape_tokens in (
        ("input-driven", 8, 784, 64, 5, 10),
        ("input-driven", 5, 75, 24, 1, 4),
        ("input-driven", 2, 3000, 40, 32, 6),
        ("learnable", 20, 2500, 64, 5, 10),
        ("learnable", 3, 20000, 64, 8, 4),
    ):
        case = _select_case(bank, batch, size, key_dim, topk, num_tape_tokens)
        yield case
        if bank == "learnable":
            yield _deterministic(case)
    for bank, batch, size, dim, capacity in (
        ("input-driven", 8, 784, 384, None),
        ("input-driven", 3, 60, 50, 40),
        ("learnable", 20, 2500, 384, 130),
        ("learnable", 9, 30, 8, None),
        ("learnable", 2100, 30, 8, 6500),  # more offsets than a block of CUDA C++ sums by itself
    ):
        case = _gather_case(bank, batch, size, dim, capacity)
        yield case
        if bank == "learnable":
            yield _deterministic(case)
    for bank, batch, size, dim, key_dim in (
        ("input-driven", 6, 784, 384, 64),
        ("learnable", 20, 2500, 384, 64),
        ("learnable", 2100, 30, 64, 64),  # long segments, and many offsets as above
    ):
        case = _read_case(bank, batch, size, dim, key_dim)
        yield case
        if bank == "learnable":
            yield _deterministic(case)
    for head_dim, lens in (
        (64, ([197, 50, 1, 0, 256, 64, 100], [10, 3, 0, 0, 0, 1, 28])),
        (32, ([17, 31, 0], [0, 2, 5])),
        (128, ([300, 80], [7, 0])),
        (24, ([130, 15, 16], [9, 0, 1])),
        (8, ([70, 1], [0, 4])),
        (64, ([1500, 3], [20, 2])),
    ):
        yield _attention_case(head_dim, *lens)
    yield _packed_attention_case([197, 50, 1, 0], [10, 3, 0, 0])
    for dim, hidden, tape_hidden, rows, inputs, end in (
        (384, 1536, 768, 500, 470, 490),
        (48, 100, 50, 77, 70, 77),
        (64, 256, 0, 130, 130, 130),
    ):
        for form in ("int", "tensor"):
            yield _ffn_case(dim, hidden, tape_hidden, rows, inputs, end, form)
    for activation in ACTIVATIONS[1:]:
        yield _ffn_case(48, 100, 50, 77, 70, 77, "int", activation)
        yield _ffn_case(48, 100, 50, 77, 70, 77, "tensor", activation)
    for num_rows, dim in ((300, 384), (7, 50), (9, 4096)):
        yield _norm_case(num_rows, dim)
    for dim, capacity in ((384, None), (50, 700), (7, None)):
        yield _compact_case(dim, capacity)
    for dim in (384, 50, 7):
        for weighted in (False, True):
            yield _accumulate_case(dim, weighted)


def _deterministic(case: CheckCase) -> CheckCase:
    return case._replace(name=f"{case.name}, deterministic", deterministic=True)


def _select_case(
    bank: str, batch: int, size: int, key_dim: int, topk: int, num_tape_tokens: int
) -> CheckCase:
    shape = (size, key_dim) if bank == "learnable" else (batch, size, key_dim)

    def inputs() -> list[Tensor]:
        return [torch.randn(batch, key_dim), torch.randn(shape)]

    def call(query: Tensor, keys: Tensor) -> Results:
        selection = ops.tape_select(
            query, keys, num_tape_tokens=num_tape_tokens, topk=topk, halt_threshold=2.5
        )
        return (selection.weights, selection.ponder), (selection.indices, selection.counts)

    return CheckCase("tape_select", f"{bank} bank of {size}, k = {topk}", inputs, call)


def _gather_case(bank: str, batch: int, size: int, dim: int, capacity: int | None) -> CheckCase:
    shape = (size, dim) if bank == "learnable" else (batch, size, dim)
    num_tape_tokens, topk = 6, 4

    def inputs() -> list[Tensor]:
        return [torch.randn(shape), torch.rand(batch, num_tape_tokens, topk)]

    def call(values: Tensor, weights: Tensor) -> Results:
        generator = torch.Generator().manual_seed(2)
        order = torch.rand(batch, size, generator=generator, device="cpu").argsort(1)[
            :, : num_tape_tokens * topk
        ]
        indices = order.view(batch, num_tape_tokens, topk).to(values.device, torch.int32)
        counts = torch.arange(batch, dtype=torch.int32) % (num_tape_tokens + 1)
        wide = torch.promote_types(values.dtype, torch.float32)
        tape, offsets = ops.tape_gather(
            values, indices, weights.to(wide), counts, capacity=capacity
        )
        return (tape,), (offsets,)

    size_of = "exact" if capacity is None else f"capacity {capacity}"
    return CheckCase("tape_gather", f"{bank} bank of {size} × {dim}, {size_of}", inputs, call)


def _read_case(bank: str, batch: int, size: int, dim: int, key_dim: int) -> CheckCase:
    """Return a read whose keys are part of the bank: its gradient is an op of its own."""
    shape = (size, dim) if bank == "learnable" else (batch, size, dim)

    def inputs() -> list[Tensor]:
        return [torch.randn(batch, key_dim), torch.randn(shape)]

    def call(query: Tensor, values: Tensor) -> Results:
        tape, offsets, selection = ops.tape_read(
            query, values, num_tape_tokens=3, topk=5, halt_threshold=1.8
        )
        differentiable = (tape, selection.weights, selection.ponder)
        return differentiable, (offsets, selection.indices, selection.counts)

    name = f"{bank} bank of {size} × {dim}, keys of {key_dim}"
    return CheckCase("tape_read_bwd", name, inputs, call)


def _attention_case(head_dim: int, input_lens: list[int], tape_lens: list[int]) -> CheckCase:
    cu_inputs, cu_tapes = layout_of(input_lens, tape_lens)
    rows = sum(input_lens) + sum(tape_lens) + 3

    def inputs() -> list[Tensor]:
        return list(torch.randn(rows, 3, 4, head_dim).unbind(1))

    longest = max(a + b for a, b in zip(input_lens, tape_lens, strict=True))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Results:
        return (ops.elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows=longest),), ()

    return CheckCase(
        "elastic_attention", f"heads of {head_dim}, up to {longest} rows", inputs, call
    )


def _packed_attention_case(input_lens: list[int], tape_lens: list[int]) -> CheckCase:
    layout = layout_of(input_lens, tape_lens)
    rows = sum(input_lens) + sum(tape_lens) + 3
    longest = max(a + b for a, b in zip(input_lens, tape_lens, strict=True))

    def call(qkv: Tensor) -> Results:
        return (ops.elastic_attention_qkvpacked(qkv, *layout, max_rows=longest),), ()

    return CheckCase(
        "elastic_attention_qkvpacked",
        f"heads of 64, up to {longest} rows",
        lambda: [torch.randn(rows, 3, 4, 64)],
        call,
    )


def _ffn_case(
    dim: int,
    hidden: int,
    tape_hidden: int,
    rows: int,
    inputs: int,
    end: int,
    form: str,
    activation: Activation = ACTIVATIONS[0],
) -> CheckCase:
    def make() -> list[Tensor]:
        x, (w1, b1, w2, b2) = torch.randn(rows, dim), _parameters(dim, hidden, hidden)
        if activation == "relu":
            # Its slope jumps at 0, where rounding may turn the sign of a pre-activation.
            b1 = 8 * b1.sign()
        tape = _parameters(dim, 2 * tape_hidden, tape_hidden) if tape_hidden else []
        return [x, w1, b1, w2, b2, *tape]

    def call(x: Tensor, *parameters: Tensor) -> Results:
        counts = (inputs, end) if form == "int" else map(torch.tensor, (inputs, end))
        num_input_rows, num_rows = counts
        tape_ffn = FFN(*parameters[4:]) if tape_hidden else None
        y = ops.dual_ffn(
            x,
            num_input_rows,
            FFN(*parameters[:4]),
            tape_ffn,
            num_rows=num_rows,
            activation=activation,
        )
        return (y,), ()

    where = "host" if form == "int" else "device"
    name = f"{dim} × {hidden} ({activation}) and {tape_hidden}, rows on the {where}"
    return CheckCase("dual_ffn", name, make, call)


def _norm_case(num_rows: int, dim: int) -> CheckCase:
    def make() -> list[Tensor]:
        return [torch.randn(num_rows, dim), torch.randn(num_rows, dim), *torch.randn(2, dim)]

    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Results:
        return ops.add_layer_norm(x, branch, weight, bias), ()

    return CheckCase("add_layer_norm", f"{num_rows} rows of {dim}", make, call)


def _compact_case(dim: int, capacity: int | None) -> CheckCase:
    input_lens, tape_lens = [197, 0, 50, 256], [10, 3, 0, 1]
    cu_inputs, cu_tapes = layout_of(input_lens, tape_lens)
    rows = sum(input_lens) + sum(tape_lens) + 3

    def inputs() -> list[Tensor]:
        return [torch.randn(rows, dim)]

    def call(data: Tensor) -> Results:
        keep = _draw(rows, data) < 0.6
        packed, *offsets, source = ops.compact_rows(
            data, keep, cu_inputs, cu_tapes, capacity=capacity
        )
        return (packed,), (*offsets, source)

    size_of = "exact" if capacity is None else f"capacity {capacity}"
    return CheckCase("compact_rows", f"{rows} rows of {dim}, {size_of}", inputs, call)


def _accumulate_case(dim: int, weighted: bool) -> CheckCase:
    num_total, num_rows = 300, 200

    def inputs() -> list[Tensor]:
        factors = [torch.rand(num_rows) for _ in range(1 + weighted)]
        return [torch.randn(num_total, dim), torch.randn(num_rows, dim), *factors]

    def call(total: Tensor, rows: Tensor, *factors: Tensor) -> Results:
        source = _draw(num_total, rows).argsort()[:num_rows]
        source = source.masked_fill(_draw(num_rows, rows) < 0.2, -1)
        wide = torch.promote_types(rows.dtype, torch.float32)
        weights, *others = (factor.to(wide) for factor in factors)
        total_weights = others[0] if weighted else None
        summed = ops.accumulate_rows(total, rows, source, weights, total_weights=total_weights)
        with torch.no_grad():
            written = ops.accumulate_rows_(
                total.clone(), rows, source, weights, total_weights=total_weights
            )
        return (summed,), ((written == summed).all(),)

    factors = "two factors" if weighted else "one factor"
    return CheckCase("accumulate_rows", f"{num_rows} rows of {dim}, {factors}", inputs, call)


def _draw(count: int, like: Tensor) -> Tensor:
    """Return the same numbers from 0 to 1 on every device."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, generator=generator, device="cpu").to(like.device)


def _parameters(dim: int, wide: int, hidden: int) -> list[Tensor]:
    return [
        torch.randn(wide, dim) * dim**-0.5,
        torch.randn(wide),
        torch.randn(dim, hidden) * hidden**-0.5,
        torch.randn(dim),
    ]


def layout_of(input_lens: Sequence[int], tape_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the offsets of inputs and tapes of these lengths."""
    tapes = torch.tensor(tape_lens, dtype=torch.int32)
    return cumulative(torch.tensor(input_lens, dtype=torch.int32)), cumulative(
        tapes, start=sum(input_lens)
    )
