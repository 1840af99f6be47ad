"""tape_select beside loops in plain torch: adatape-kernels bench tape_select --quick"""

import functools
import itertools
from typing import Any, NamedTuple

import torch

from adatape_kernels import ops, use_backend
from adatape_kernels.benchmarks.harness.cases import (
    BenchmarkCase,
    Prepared,
    nbytes,
    ours,
    own_kernels,
    with_backward,
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


class SelectShape(NamedTuple):
    B: Size = Size(64)
    M: Size = Size(784)
    bank: BankKind = BankKind("input")
    K: Size = Size(64)
    k: Size = Size(5)
    T: Size = Size(10)
    tau: Positive = Positive(10)
    """From T on no example halts before it has read T tape tokens."""

    @property
    def options(self) -> dict[str, Any]:
        """The op's arguments behind query and keys."""
        return {"num_tape_tokens": self.T, "topk": self.k, "halt_threshold": float(self.tau)}


def inputs(shape: SelectShape, dtype: torch.dtype, device_type: str, backward: bool) -> ReadInputs:
    bank = shape.bank.shape(shape.B, shape.M, shape.K)
    return read_inputs(
        shape.B, bank, shape.K, shape.options, dtype, device_type, backward=backward, gathers=False
    )


def elastic(given: ReadInputs) -> Prepared:
    return peer(ops.tape_select)(given)


def peer(select: Any) -> Any:
    """Make a provider of a function with the arguments of `ops.tape_select`."""

    def prepare(given: ReadInputs) -> Prepared:
        def run() -> list[torch.Tensor]:
            return given.finish(select(given.query, given.bank, **given.options))

        return Prepared(run, lambda results: results)

    return prepare


def reference(given: ReadInputs) -> list[torch.Tensor]:
    with use_backend("eager"):
        each = elastic(given.double())
        return list(each.results(each.run()))


def case(shape: SelectShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    given = inputs(shape, dtype, device_type, backward)
    keys = given.bank
    tape_tokens = int(
        ops.tape_select(given.query.detach(), keys.detach(), **given.options).counts.sum()
    )
    read = tape_tokens * shape.k
    key = shape.K * dtype.itemsize
    shared = keys.dim() == 2
    touched = min(read, shape.M) if shared else read
    flops, moved = (
        2.0 * tape_tokens * shape.M * shape.K + 2 * read * shape.K,
        nbytes([keys]) + 8 * read,
    )
    if backward:
        flops += 8 * read * shape.K
        moved += touched * key + nbytes([keys]) + 8 * read
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(shape, dtype, device_type, backward),
        reference=reference,
        providers=[
            *ours(SUITE.op, elastic, device_type, dtype),
            *reading_peers.providers(elastic, peer, reading_peers.loop, device_type),
        ],
        flops=flops,
        bytes=moved,
        measured_ops=with_backward("tape_select", backward),
        agree=functools.partial(agree_on_reads, shared=shared and backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 64
    default = [
        f"B={batch} M=784 bank=input",
        f"B={batch} M=10000 bank=learn",
        f"B={batch} M=196 bank=input K=384 tau=2",
    ]
    scaling = [f"B=16 M={m} bank=learn" for m in (196, 1000, 5000, 20_000, 100_000)]
    sweep = [
        f"B={b} M={m} bank={bank} T={t} tau={t}"
        for bank, m, t, b in itertools.product(
            reading_peers.BANKS,
            (196, 784, 3136, 10_000, 100_000),
            (10, 32, 64, 128),
            (1, 4, 16, 64, 256, 512),
        )
        # A bank of its own for each of many examples is more than a machine holds.
        if m >= 5 * t and (bank == "learn" or b * m <= 2_000_000)
    ]
    return Selection(default[:2], default, sweep, scaling)


SUITE = Suite(
    op="tape_select",
    shape=SelectShape,
    directions=("forward", "forward+backward"),
    providers=[*own_kernels(), *reading_peers.NAMES],
    shapes=shapes,
    dtypes=for_reading,
    case=case,
    check=reading_peers.check,
)
