"""compact_rows beside boolean indexing and masked copies: adatape-kernels bench compact_rows"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
    for_products,
    shape_text,
)


class RowsShape(NamedTuple):
    B: Size = Size(32)
    N: Size = Size(197)
    D: Size = Size(768)
    kept: Size = Size(50)


def check(shape: RowsShape) -> None:
    """Raise ValueError where more rows are kept than there are."""
    if shape.kept > 100:
        raise ValueError(f"shape: expected kept of 1 to 100 percent, got {shape.kept}")


class RowsInputs(NamedTuple):
    data: Tensor
    """(rows, dim)."""
    keep: Tensor
    """(rows,) bool."""
    cu_inputs: Tensor
    cu_tapes: Tensor
    dpacked: Tensor
    """(rows kept, dim)."""
    backward: bool

    def finish(self, packed: Tensor, dpacked: Tensor) -> list[Tensor]:
        if not self.backward:
            return [packed]
        return [packed, *torch.autograd.grad(packed, self.data, dpacked)]


def inputs(shape: RowsShape, dtype: torch.dtype, device_type: str, backward: bool) -> RowsInputs:
    rows = shape.B * shape.N
    count = max(rows * shape.kept // 100, 1)
    with torch.device(device_type):
        keep = torch.zeros(rows, dtype=torch.bool)
        keep[torch.randperm(rows)[:count]] = True
        cu_inputs = torch.arange(shape.B + 1, dtype=torch.int32) * shape.N
        data = torch.randn(rows, shape.D).to(dtype).requires_grad_(backward)
        dpacked = torch.randn(count, shape.D).to(dtype)
    return RowsInputs(data, keep, cu_inputs, torch.full_like(cu_inputs, rows), dpacked, backward)


def elastic(given: RowsInputs, capacity: int | None = None) -> Prepared:
    def run() -> list[Tensor]:
        packed, *_ = ops.compact_rows(
            given.data, given.keep, given.cu_inputs, given.cu_tapes, capacity=capacity
        )
        return given.finish(packed, given.dpacked)

    return Prepared(run, lambda found: found)


def with_capacity(given: RowsInputs) -> Prepared:
    """Tell the op the number of rows beforehand, so that nothing is copied to the host."""
    return elastic(given, capacity=len(given.dpacked))


def indexing(given: RowsInputs) -> Prepared:
    """Prepare what everybody writes, which also copies the number of rows to the host."""
    return Prepared(
        lambda: given.finish(given.data[given.keep], given.dpacked), lambda found: found
    )


def selection(given: RowsInputs) -> Prepared:
    """Prepare a selection of rows whose numbers are found before the clock starts."""
    source = given.keep.nonzero().squeeze(1)
    return Prepared(
        lambda: given.finish(given.data.index_select(0, source), given.dpacked), lambda found: found
    )


def masked_copy(data: Tensor, keep: Tensor) -> Tensor:
    """Keep the buffer's size and clear the rows that leave, as models do that only mask."""
    return data.where(keep.unsqueeze(1), 0)


def masked(copy: Callable[..., Tensor]) -> Any:
    """Return a peer whose rows stay where they are."""

    def prepare(given: RowsInputs) -> Prepared:
        whole = torch.zeros_like(given.data).index_put((given.keep,), given.dpacked).detach()

        def results(found: Any) -> list[Tensor]:
            packed, *grads = found
            return [packed[given.keep], *grads]

        return Prepared(lambda: given.finish(copy(given.data, given.keep), whole), results)

    return prepare


def plain_copy(given: RowsInputs) -> Prepared:
    """Prepare a copy of as many neighbouring rows: what the machine can do."""
    source = given.data.detach()[: len(given.dpacked)]
    target = torch.empty_like(given.dpacked)
    return Prepared(lambda: [target.copy_(source)], lambda found: found)


def reference(given: RowsInputs) -> list[Tensor]:
    data = given.data.detach().double().requires_grad_(given.backward)
    with use_backend("eager"):
        found = elastic(given._replace(data=data, dpacked=given.dpacked.double())).run()
    return found  # type: ignore[return-value]


CAPACITY = f"{OURS}, capacity"
PEERS = ("eager", "x[mask]", "index_select", "masked", "masked, compiled", "copy_ (anchor)")


def case(shape: RowsShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    rows, row = shape.B * shape.N, shape.D * dtype.itemsize
    count = max(rows * shape.kept // 100, 1)
    moved = 2 * count * row + rows + 4 * count
    if backward:  # rows that left are written as well, but never read
        moved += (count + rows) * row + 4 * count
    eager, boolean, select, plain, compiled, anchor = PEERS
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
            Provider(boolean, indexing, graph=False),
            Provider(select, selection),
            Provider(plain, masked(masked_copy)),
            Provider(compiled, masked(torch.compile(masked_copy, dynamic=False)), compiled=True),
            Provider(anchor, plain_copy, checked=False),
        ],
        flops=0.0,
        bytes=moved,
        measured_ops=with_backward("compact_rows", backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 32
    default = [f"B={batch} kept={kept}" for kept in (50, 100, 75, 25)]
    sweep = [
        f"B={b} N={n} D={dim} kept={kept}"
        for b in (8, 32, 256)
        for n in (50, 197, 577)
        for dim in (192, 384, 768, 1024)
        for kept in (5, 25, 50, 75, 100)
    ]
    return Selection(default[:1], default, sweep)


SUITE = Suite(
    op="compact_rows",
    shape=RowsShape,
    directions=("forward", "forward+backward"),
    providers=[*own_kernels(), *own_kernels(CAPACITY), *PEERS],
    shapes=shapes,
    dtypes=for_products,
    case=case,
    check=check,
)
