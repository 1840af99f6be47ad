"""tape_gather beside padded gathering and embedding_bag: adatape-kernels bench tape_gather"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import ops, use_backend
from adatape_kernels.benchmarks.harness.cases import (
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
    ours,
    own_kernels,
    with_backend,
    with_backward,
)
from adatape_kernels.benchmarks.harness.suites import (
    Selection,
    Size,
    Suite,
    Tape,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops import reading_peers
from adatape_kernels.benchmarks.ops.reading_peers import BankKind, padded_gather
from adatape_kernels.op_types import wide_dtype


class GatherShape(NamedTuple):
    B: Size = Size(64)
    M: Size = Size(784)
    bank: BankKind = BankKind("input")
    D: Size = Size(384)
    k: Size = Size(5)
    T: Size = Size(10)
    tape: Tape = Tape("uniform")


def check(shape: GatherShape) -> None:
    """Raise ValueError where the bank holds too few tokens."""
    if shape.M < shape.T * shape.k:
        raise ValueError(f"shape: expected M from T · k = {shape.T * shape.k} on, got {shape.M}")


class GatherInputs(NamedTuple):
    bank: Tensor
    """([batch,] bank_size, dim)."""
    indices: Tensor
    """(batch, num_tape_tokens, topk) int32."""
    weights: Tensor
    counts: Tensor
    exists: Tensor
    """(batch, num_tape_tokens) bool."""
    dtape: Tensor
    """(rows, dim)."""
    backward: bool

    def finish(self, tape: Tensor, dtape: Tensor) -> list[Tensor]:
        if not self.backward:
            return [tape]
        return [tape, *torch.autograd.grad(tape, (self.bank, self.weights), dtape)]


def inputs(
    shape: GatherShape, dtype: torch.dtype, device_type: str, backward: bool
) -> GatherInputs:
    lens = shape.tape.lens(shape.B, shape.T)
    with torch.device(device_type):
        bank = torch.randn(shape.bank.shape(shape.B, shape.M, shape.D)).to(dtype)
        entries = [torch.randperm(shape.M)[: shape.T * shape.k] for _ in range(shape.B)]
        indices = torch.stack(entries).view(shape.B, shape.T, shape.k).int()
        weights = torch.rand(shape.B, shape.T, shape.k, dtype=wide_dtype(dtype))
        counts = torch.tensor(lens, dtype=torch.int32)
        exists = torch.arange(shape.T) < counts.unsqueeze(1)
        dtape = torch.randn(sum(lens), shape.D).to(dtype)
    for leaf in (bank, weights):
        leaf.requires_grad_(backward)
    return GatherInputs(bank, indices, weights, counts, exists, dtape, backward)


def elastic(given: GatherInputs, capacity: int | None = None) -> Prepared:
    def run() -> list[Tensor]:
        tape, _ = ops.tape_gather(
            given.bank, given.indices, given.weights, given.counts, capacity=capacity
        )
        return given.finish(tape, given.dtape)

    return Prepared(run, lambda found: found)


def with_capacity(given: GatherInputs) -> Prepared:
    """Tell the op the number of rows beforehand, so that nothing is copied to the host."""
    return elastic(given, capacity=len(given.dtape))


def padded(pack: bool, gather: Callable[..., Tensor] = padded_gather) -> Any:
    """Return a peer that gathers T tokens for every example, and with `pack` drops the unread."""

    def prepare(given: GatherInputs) -> Prepared:
        dtape = given.dtape
        if not pack:
            whole = dtape.new_zeros(*given.exists.shape, dtape.shape[1])
            dtape = whole.index_put((given.exists,), dtape)

        def run() -> list[Tensor]:
            tape = gather(given.bank, given.indices, given.weights)
            return given.finish(tape[given.exists] if pack else tape, dtape)

        def results(found: Sequence[Tensor]) -> list[Tensor]:
            tape, *grads = found
            return [tape if pack else tape[given.exists], *grads]

        return Prepared(run, results)

    return prepare


def embedding_bag(given: GatherInputs) -> Prepared:
    """Prepare torch's weighted sums of rows; which rows exist is found before the clock starts."""
    chosen = given.indices.long()
    if given.bank.dim() == 3:
        batch, bank_size, _ = given.bank.shape
        starts = bank_size * torch.arange(batch, device=chosen.device)
        chosen = chosen + starts.view(-1, 1, 1)
    chosen = chosen[given.exists]
    bank = given.bank.detach().flatten(0, -2).requires_grad_(given.backward)
    weights = given.weights.detach()[given.exists].to(bank.dtype).requires_grad_(given.backward)

    def run() -> list[Tensor]:
        tape = F.embedding_bag(chosen, bank, mode="sum", per_sample_weights=weights)
        if not given.backward:
            return [tape]
        return [tape, *torch.autograd.grad(tape, (bank, weights), given.dtape)]

    def results(found: Sequence[Tensor]) -> list[Tensor]:
        if not given.backward:
            return list(found)
        tape, dbank, dweights = found
        whole = torch.zeros_like(given.weights).index_put(
            (given.exists,), dweights.to(given.weights.dtype)
        )
        return [tape, dbank.view(given.bank.shape), whole]

    return Prepared(run, results)


def reference(given: GatherInputs) -> list[Tensor]:
    bank, weights = (
        x.detach().double().requires_grad_(given.backward) for x in (given.bank, given.weights)
    )
    exact = given._replace(bank=bank, weights=weights, dtape=given.dtape.double())
    with use_backend("eager"):
        return elastic(exact).run()  # type: ignore[return-value]


CAPACITY = f"{OURS}, capacity"
PEERS = ("eager", "padded", "padded + pack", "padded, compiled", "embedding_bag")


def case(shape: GatherShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    given = inputs(shape, dtype, device_type, backward)
    tape_rows, shared = len(given.dtape), given.bank.dim() == 2
    used = given.indices[given.exists]
    touched = len(used.unique()) if shared else used.numel()
    row, entries = shape.D * dtype.itemsize, given.bank.numel() // shape.D
    flops, moved = (
        2.0 * tape_rows * shape.k * shape.D,
        (touched + tape_rows) * row + 8 * used.numel(),
    )
    if backward:
        flops, moved = 3 * flops, moved + (touched + tape_rows + entries) * row + 12 * used.numel()
    eager, plain, packing, compiled, bag = PEERS
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(shape, dtype, device_type, backward),
        reference=reference,
        providers=[
            *ours(SUITE.op, elastic, device_type, dtype, graph=False),
            *ours(SUITE.op, with_capacity, device_type, dtype, CAPACITY),
            with_backend(Provider(eager, elastic, graph=False), "eager"),
            Provider(plain, padded(pack=False)),
            Provider(packing, padded(pack=True), graph=False),
            Provider(
                compiled,
                padded(pack=False, gather=torch.compile(padded_gather, dynamic=False)),
                compiled=True,
            ),
            Provider(bag, embedding_bag),
        ],
        flops=flops,
        bytes=moved,
        measured_ops=with_backward("tape_gather", backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 64
    default = [
        f"B={batch} M=784 bank=input",
        f"B={batch} M=10000 bank=learn T=64 tape=skewed",
        f"B={batch} M=784 bank=input D=768 tape=full",
    ]
    sweep = [
        f"B={b} M={m} bank={bank} D={dim} T={t} tape={tape}"
        for bank, m, dim, t, tape, b in itertools.product(
            reading_peers.BANKS,
            (784, 10_000, 100_000),
            (192, 384, 768, 1024),
            (10, 32, 64, 128),
            ("zero", "full", "uniform", "skewed"),
            (1, 8, 64, 256, 512),
        )
        if m >= 5 * t and (bank == "learn" or b * m * dim <= 500_000_000)
    ]
    return Selection(default[:1], default, sweep)


SUITE = Suite(
    op="tape_gather",
    shape=GatherShape,
    directions=("forward", "forward+backward"),
    providers=[*own_kernels(), *own_kernels(CAPACITY), *PEERS],
    shapes=shapes,
    dtypes=for_products,
    case=case,
    check=check,
)
