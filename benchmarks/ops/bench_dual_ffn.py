"""dual_ffn beside torch's products: adatape-kernels bench dual_ffn --quick"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import ops, use_backend
from adatape_kernels.activations import activate
from adatape_kernels.benchmarks.harness.cases import (
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
    nbytes,
    ours,
    own_kernels,
    with_backend,
    with_backward,
)
from adatape_kernels.benchmarks.harness.suites import (
    Act,
    Selection,
    Size,
    Suite,
    Tape,
    for_products,
    shape_text,
)
from adatape_kernels.op_types import ACTIVATIONS, Activation
from adatape_kernels.ops import FFN, ffn_products


class FeedForwardShape(NamedTuple):
    B: Size = Size(16)
    N: Size = Size(197)
    T: Size = Size(10)
    tape: Tape = Tape("uniform")
    D: Size = Size(384)
    F: Size = Size(1536)
    G: Size = Size(384)
    act: Act = Act(Act.usual)


class FFNInputs(NamedTuple):
    x: Tensor
    """(rows, dim); the input rows come first."""
    num_input_rows: int
    input_ffn: FFN
    tape_ffn: FFN
    dy: Tensor
    backward: bool
    activation: Activation

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has gradients."""
        return self.x, *self.input_ffn, *self.tape_ffn

    def finish(self, y: Tensor, leaves: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return y, and the gradients of the leaves if the backward is measured."""
        grads = torch.autograd.grad(y, leaves or self.leaves, self.dy) if self.backward else ()
        return [y, *grads]


def inputs(
    shape: FeedForwardShape, dtype: torch.dtype, device_type: str, backward: bool
) -> FFNInputs:
    num_input_rows = shape.B * shape.N
    rows = num_input_rows + sum(shape.tape.lens(shape.B, shape.T))

    def parameters(wide: int, hidden: int) -> FFN:
        shapes = ((wide, shape.D), (wide,), (shape.D, hidden), (shape.D,))
        return FFN(
            *((torch.randn(s) * s[-1] ** -0.5).to(dtype).requires_grad_(backward) for s in shapes)
        )

    with torch.device(device_type):
        return FFNInputs(
            torch.randn(rows, shape.D).to(dtype).requires_grad_(backward),
            num_input_rows,
            parameters(shape.F, shape.F),
            parameters(2 * shape.G, shape.G),
            torch.randn(rows, shape.D).to(dtype),
            backward,
            cast(Activation, str(shape.act)),
        )


def elastic(given: FFNInputs) -> Prepared:
    def run() -> list[Tensor]:
        y = ops.dual_ffn(
            given.x,
            given.num_input_rows,
            given.input_ffn,
            given.tape_ffn,
            activation=given.activation,
        )
        return given.finish(y)

    return Prepared(run, lambda found: found)


def elastic_grouped(given: FFNInputs) -> Prepared:
    """Prepare Triton's other form of the products: one launch for both kinds of rows."""
    each = elastic(given)

    def run() -> object:
        with ffn_products("grouped"):
            return each.run()

    return each._replace(run=run)


def sliced(x: Tensor, num_input_rows: int, one: FFN, two: FFN, activation: Activation) -> Tensor:
    act = activate(F.linear(x[:num_input_rows], one.w1, one.b1), activation)
    tape = F.glu(F.linear(x[num_input_rows:], two.w1, two.b1))
    return torch.cat([F.linear(act, one.w2, one.b2), F.linear(tape, two.w2, two.b2)])


def all_rows(x: Tensor, num_input_rows: int, one: FFN, two: FFN, activation: Activation) -> Tensor:
    """Compute both feed-forwards for every row and choose, as a naive port does."""
    act = activate(F.linear(x, one.w1, one.b1), activation)
    tape = F.glu(F.linear(x, two.w1, two.b1))
    is_input = torch.arange(len(x), device=x.device).unsqueeze(1) < num_input_rows
    return torch.where(is_input, F.linear(act, one.w2, one.b2), F.linear(tape, two.w2, two.b2))


def function(compute: Callable[..., Tensor]) -> Callable[[FFNInputs], Prepared]:
    def prepare(given: FFNInputs) -> Prepared:
        def run() -> list[Tensor]:
            ffns = given.input_ffn, given.tape_ffn
            y = compute(given.x, given.num_input_rows, *ffns, given.activation)
            return given.finish(y)

        return Prepared(run, lambda found: found)

    return prepare


def grouped_mm(given: FFNInputs) -> Prepared:
    """Prepare a peer whose layers are one F.grouped_mm each.

    That function wants equal widths, so the narrower weights are padded with zeros.
    """
    middle, rows = given.num_input_rows, len(given.x)
    ends = torch.tensor([middle, rows], dtype=torch.int32, device=given.x.device)
    both = [given.input_ffn, given.tape_ffn]

    def stacked(weights: Sequence[Tensor]) -> Tensor:
        """Return weights as (2, inputs, outputs), zero where one of them is narrower."""
        inputs, outputs = (max(sizes) for sizes in zip(*(w.mT.shape for w in weights), strict=True))
        whole = given.x.new_zeros(2, inputs, outputs)
        for place, w in zip(whole, weights, strict=True):
            place[: w.shape[1], : w.shape[0]] = w.detach().mT
        return whole.requires_grad_(given.backward)

    w1, w2 = stacked([ffn.w1 for ffn in both]), stacked([ffn.w2 for ffn in both])
    biases = [
        bias.detach().clone().requires_grad_(given.backward)
        for ffn in both
        for bias in (ffn.b1, ffn.b2)
    ]
    b1, b2, c1, c2 = biases
    hidden, gates = len(b1), len(c1)
    leaves = [given.x, w1, w2, *biases]

    def run() -> list[Tensor]:
        h = F.grouped_mm(given.x, w1, offs=ends)
        act = activate(h[:middle, :hidden] + b1, given.activation)
        tape = F.glu(h[middle:, :gates] + c1)
        joined = torch.cat([F.pad(a, (0, w2.shape[1] - a.shape[1])) for a in (act, tape)])
        y = F.grouped_mm(joined, w2, offs=ends)
        return given.finish(torch.cat([y[:middle] + b2, y[middle:] + c2]), leaves)

    def results(found: Sequence[Tensor]) -> list[Tensor]:
        if not given.backward:
            return list(found)
        y, dx, dw1, dw2, db1, db2, dc1, dc2 = found

        def unstacked(dw: Tensor, weight: Tensor) -> Tensor:
            """Return the gradient of one of the stacked weights."""
            outputs, inputs = weight.shape
            return dw[:inputs, :outputs].mT

        made = [y, dx]
        for ffn, du1, db, du2, dc in zip(both, dw1, (db1, dc1), dw2, (db2, dc2), strict=True):
            made += [unstacked(du1, ffn.w1), db, unstacked(du2, ffn.w2), dc]
        return made

    return Prepared(run, results)


def reference(given: FFNInputs) -> list[Tensor]:
    x, *parameters = (x.detach().double().requires_grad_(given.backward) for x in given.leaves)
    exact = given._replace(
        x=x, input_ffn=FFN(*parameters[:4]), tape_ffn=FFN(*parameters[4:]), dy=given.dy.double()
    )
    with use_backend("eager"):
        return elastic(exact).run()  # type: ignore[return-value]


PEERS = ("sliced", "sliced, compiled", "grouped_mm", "all rows + where")
GROUPED = f"{OURS} triton, grouped products"


def case(
    shape: FeedForwardShape, direction: str, dtype: torch.dtype, device_type: str
) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    given = inputs(shape, dtype, device_type, backward)
    rows, tape_rows = len(given.x), len(given.x) - given.num_input_rows
    products = given.num_input_rows * 2 * shape.F + tape_rows * 3 * shape.G
    kept = (given.num_input_rows * shape.F + tape_rows * 2 * shape.G) * dtype.itemsize
    weights = nbytes([*given.input_ffn, *given.tape_ffn])
    token = rows * shape.D * dtype.itemsize
    slices, compiled, grouped, everything = PEERS
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
            *(
                [with_backend(Provider(GROUPED, elastic_grouped), "triton")]
                if device_type == "cuda"
                else []
            ),
            Provider(slices, function(sliced)),
            Provider(compiled, function(torch.compile(sliced, dynamic=False)), compiled=True),
            Provider(grouped, grouped_mm),
            Provider(everything, function(all_rows)),
        ],
        # x, y and the weights pass through memory. A training step keeps the pre-activations and
        # reads them again, and moves dy, dx and the gradients of the weights.
        flops=2.0 * shape.D * products * (3 if backward else 1),
        bytes=2 * token + weights + (3 * token + 2 * kept + 2 * weights if backward else 0),
        peaks=backward,
        measured_ops=with_backward("dual_ffn", backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 16
    default = [
        f"B={batch} N=197 T=10",
        f"B={batch} N=50 T=64 tape=uniform D=768 F=3072 G=768",
        *(f"B={batch} N=197 T=10 act={act}" for act in ACTIVATIONS if act != Act.usual),
    ]
    sweep = [
        f"B={b} N={n} T={t} tape={tape} D={dim} F={4 * dim} G={dim}"
        for dim, n, t, tape, b in itertools.product(
            (192, 384, 768, 1024),
            (197, 50),
            (10, 32, 64, 128),
            ("zero", "full", "uniform", "skewed"),
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )
    ]
    return Selection(default[:1], default, sweep)


SUITE = Suite(
    op="dual_ffn",
    shape=FeedForwardShape,
    directions=("forward", "forward+backward"),
    providers=[*own_kernels(), GROUPED, *PEERS],
    shapes=shapes,
    dtypes=for_products,
    case=case,
)
