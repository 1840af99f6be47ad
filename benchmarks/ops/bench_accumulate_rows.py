"""accumulate_rows beside index_add and masked sums: adatape-kernels bench accumulate_rows"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ops, use_backend
from adatape_kernels.benchmarks.harness.cases import (
    BenchmarkCase,
    Prepared,
    Provider,
    ours,
    own_kernels,
    with_backend,
    with_backward,
)
from adatape_kernels.benchmarks.harness.suites import (
    Suite,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops import bench_compact_rows
from adatape_kernels.benchmarks.ops.bench_compact_rows import RowsShape


class AccumulateInputs(NamedTuple):
    total: Tensor
    """(all rows, dim) float32."""
    rows: Tensor
    """(rows kept, dim)."""
    source: Tensor
    """(rows kept,) int64, in ascending order."""
    weights: Tensor
    """(rows kept,) float32."""
    dsum: Tensor
    """Shaped as total."""
    backward: bool

    def finish(self, total: Tensor) -> list[Tensor]:
        if not self.backward:
            return [total]
        return [total, *torch.autograd.grad(total, (self.rows, self.weights), self.dsum)]

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows and weights with zeros for the rows that have left."""
        every = self.rows.new_zeros(self.total.shape).index_put((self.source,), self.rows)
        weights = self.weights.new_zeros(len(every)).index_put((self.source,), self.weights)
        return every.detach(), weights.detach()


def inputs(
    shape: RowsShape, dtype: torch.dtype, device_type: str, backward: bool
) -> AccumulateInputs:
    rows = shape.B * shape.N
    count = max(rows * shape.kept // 100, 1)
    with torch.device(device_type):
        return AccumulateInputs(
            torch.randn(rows, shape.D),
            torch.randn(count, shape.D).to(dtype).requires_grad_(backward),
            torch.randperm(rows)[:count].sort().values,
            torch.rand(count).requires_grad_(backward),
            torch.randn(rows, shape.D),
            backward,
        )


def elastic(given: AccumulateInputs) -> Prepared:
    source = given.source.to(torch.int32)

    def run() -> list[Tensor]:
        return given.finish(ops.accumulate_rows(given.total, given.rows, source, given.weights))

    return Prepared(run, lambda found: found)


def elastic_in_place(given: AccumulateInputs) -> Prepared:
    total, source = given.total.clone(), given.source.to(torch.int32)
    return Prepared(
        lambda: [ops.accumulate_rows_(total, given.rows, source, given.weights)],
        lambda found: found,
    )


def index_add(given: AccumulateInputs) -> Prepared:
    def run() -> list[Tensor]:
        weighted = given.weights.unsqueeze(1) * given.rows
        return given.finish(given.total.index_add(0, given.source, weighted))

    return Prepared(run, lambda found: found)


def index_add_in_place(given: AccumulateInputs) -> Prepared:
    total = given.total.clone()
    return Prepared(
        lambda: [total.index_add_(0, given.source, given.weights.unsqueeze(1) * given.rows)],
        lambda found: found,
    )


def index_put(given: AccumulateInputs) -> Prepared:
    """Prepare what one writes who knows that no row of the total is named twice."""

    def run() -> list[Tensor]:
        after = given.total[given.source] + given.weights.unsqueeze(1) * given.rows
        return given.finish(given.total.index_put((given.source,), after))

    return Prepared(run, lambda found: found)


def masked_sum(total: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Add all rows, as models do that only mask; what has left weighs nothing."""
    return total + weights.unsqueeze(1) * rows


def masked(add: Callable[..., Tensor]) -> Any:
    """Return a peer whose rows stay where they are."""

    def prepare(given: AccumulateInputs) -> Prepared:
        rows, weights = (x.requires_grad_(given.backward) for x in given.all_rows())
        every = given._replace(rows=rows, weights=weights)

        def results(found: Any) -> list[Tensor]:
            total, *grads = found
            return [total, *(grad[given.source] for grad in grads)]

        return Prepared(lambda: every.finish(add(given.total, rows, weights)), results)

    return prepare


def reference(given: AccumulateInputs) -> list[Tensor]:
    exact = given._replace(
        total=given.total.double(),
        rows=given.rows.detach().double().requires_grad_(given.backward),
        weights=given.weights.detach().double().requires_grad_(given.backward),
        dsum=given.dsum.double(),
    )
    with use_backend("eager"):
        return elastic(exact).run()  # type: ignore[return-value]


IN_PLACE = "in place"
"""The direction in which the total is changed, which has no gradient."""

PEERS = ("eager", "index_add", "index_add_", "index_put", "masked", "masked, compiled")


def case(shape: RowsShape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    count = max(shape.B * shape.N * shape.kept // 100, 1)
    total, row = 4 * shape.D, shape.D * dtype.itemsize
    # The rows of the total that are written, which are read before, and each row that is added.
    written = count if direction == IN_PLACE else shape.B * shape.N
    moved = 2 * written * total + count * (row + 8)
    if backward:  # Of the total's gradient only the rows that are added to are read.
        moved += count * (total + 2 * row + 12)
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: inputs(shape, dtype, device_type, backward),
        reference=reference,
        providers=_providers(direction, dtype, device_type),
        flops=0.0,
        bytes=moved,
        measured_ops=with_backward(_op(direction), backward),
    )


def _op(direction: str) -> str:
    return "accumulate_rows_" if direction == IN_PLACE else "accumulate_rows"


def _providers(direction: str, dtype: torch.dtype, device_type: str) -> list[Provider]:
    eager, add, add_in_place, put, plain, compiled = PEERS
    prepare = elastic_in_place if direction == IN_PLACE else elastic
    own = [
        *ours(_op(direction), prepare, device_type, dtype),
        with_backend(Provider(eager, prepare, graph=False), "eager"),
    ]
    if direction == IN_PLACE:
        return [*own, Provider(add_in_place, index_add_in_place)]
    return [
        *own,
        Provider(add, index_add),
        Provider(put, index_put),
        Provider(plain, masked(masked_sum)),
        Provider(compiled, masked(torch.compile(masked_sum, dynamic=False)), compiled=True),
    ]


SUITE = Suite(
    op="accumulate_rows",
    shape=RowsShape,
    directions=("forward", "forward+backward", IN_PLACE),
    providers=[*own_kernels(), *PEERS],
    shapes=bench_compact_rows.shapes,
    dtypes=for_products,
    case=case,
    check=bench_compact_rows.check,
)
