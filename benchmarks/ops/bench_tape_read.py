"""tape_read, which selects and gathers, beside loops: adatape-kernels bench tape_read --quick

The keys are the bank's leading features, so that both reads have one gradient of the bank.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops, use_backend
from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
)
from adatape_kernels.benchmarks.harness.suites import (
    Positive,
    Selection,
    Size,
    Suite,
    for_reading,
    shape_text,
)
from adatape_kernels.benchmarks.ops import reading_peers
from adatape_kernels.benchmarks.ops.reading_peers import (
    BankKind,
    ReadInputs,
    agree_on_reads,
    read_inputs,
)

TWO_OPS = f"{OURS}, two ops"
"""This one selects on a slice of the bank, then gathers; autograd adds the two gradients."""


class ReadShape(NamedTuple):
    B: Size = Size(64)
    M: Size = Size(784)
    bank: BankKind = BankKind("input")
    D: Size = Size(384)
    K: Size = Size(64)
    k: Size = Size(5)
    T: Size = Size(10)
    tau: Positive = Positive(10)

    @property
    def options(self) -> dict[str, Any]:
        """The op's arguments behind query and bank."""
        return {"num_tape_tokens": self.T, "topk": self.k, "halt_threshold": float(self.tau)}


def inputs(shape: ReadShape, dtype: torch.dtype, device_type: str, backward: bool) -> ReadInputs:
    bank = shape.bank.shape(shape.B, shape.M, shape.D)
    return read_inputs(
        shape.B, bank, shape.K, shape.options, dtype, device_type, backward=backward, gathers=True
    )


def one_op(given: ReadInputs) -> Any:
    tape, _, selection = ops.tape_read(given.query, given.bank, **given.options)
    return selection, tape


def two_ops(given: ReadInputs) -> Any:
    keys = given.bank[..., : given.query.shape[1]]
    selection = ops.tape_select(given.query, keys, **given.options)
    tape, _ = ops.tape_gather(given.bank, selection.indices, selection.weights, selection.counts)
    return selection, tape


def packed(read: Any) -> Any:
    """Make a provider of a function that returns the tape without gaps."""

    def prepare(given: ReadInputs) -> Prepared:
        assert given.dtape is not None
        with torch.no_grad():
            selection, _ = read(given)
        counts = selection.counts
        exists = torch.arange(given.dtape.shape[1], device=counts.device) < counts.unsqueeze(1)
        dtape = given.dtape[exists]

        def results(found: Sequence[Tensor]) -> list[Tensor]:
            indices, weights, ponder, rows, *grads = found
            tape = torch.zeros_like(given.dtape).index_put((exists,), rows)
            return [indices, weights, ponder, tape, *grads]

        return Prepared(lambda: given.finish(*read(given), dtape), results)

    return prepare


def padded(function: Any) -> Any:
    """Make a provider of a function that returns the tape padded."""

    def prepare(given: ReadInputs) -> Prepared:
        def run() -> list[Tensor]:
            return given.finish(*function(given.query, given.bank, **given.options), given.dtape)

        return Prepared(run, lambda found: found)

    return prepare


def reference(given: ReadInputs) -> list[Tensor]:
    with use_backend("eager"):
        each = packed(one_op)(given.double())
        return list(each.results(each.run()))


def case(shape: ReadShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    given = inputs(shape, dtype, device_type, backward)
    bank = given.bank
    with torch.no_grad():
        selection, _ = one_op(given)
    tape_tokens = int(selection.counts.sum())
    read, size, shared = tape_tokens * shape.k, dtype.itemsize, bank.dim() == 2
    entries, touched = bank.numel() // shape.D, min(read, shape.M) if shared else read
    # The keys once, the rows that are read, and the tape; then the same rows and a whole gradient.
    flops = 2.0 * tape_tokens * shape.M * shape.K + 2 * read * (shape.K + shape.D)
    moved = (entries * shape.K + (touched + tape_tokens) * shape.D) * size + 8 * read
    if backward:
        flops += 8 * read * shape.K + 4 * read * shape.D
        moved += (touched + tape_tokens + entries) * shape.D * size + 12 * read
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(shape, dtype, device_type, backward),
        reference=reference,
        providers=[
            Provider(OURS, packed(one_op), ANY_BACKEND, graph=False),
            Provider(TWO_OPS, packed(two_ops), ANY_BACKEND, graph=False),
            *reading_peers.providers(
                packed(two_ops), padded, reading_peers.loop_and_gather, device_type
            ),
        ],
        flops=flops,
        bytes=moved,
        # The gradient is one op's or two ops', depending on the provider.
        measured_ops=["tape_select", "tape_gather"],
        agree=functools.partial(agree_on_reads, shared=shared and backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 64
    default = [f"B={batch} M=784 bank=input", f"B={batch} M=10000 bank=learn"]
    sweep = [f"B={b} M={m} bank=learn" for m in (196, 1000, 10_000, 100_000) for b in (1, 64, 512)]
    return Selection(default[:1], default, sweep)


SUITE = Suite(
    op="tape_read",
    shape=ReadShape,
    directions=("forward", "forward+backward"),
    providers=[OURS, TWO_OPS, *reading_peers.NAMES],
    shapes=shapes,
    dtypes=for_reading,
    case=case,
    check=reading_peers.check,
)
