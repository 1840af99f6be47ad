"""elastic_attention beside its peers: adatape-kernels bench elastic_attention --quick

The batch is ragged: example i has N input rows (N may be a span) and t_i tape rows. The layout that
a peer needs (padded, packed, nested, buckets) is made before the clock starts.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

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
    Selection,
    Size,
    Span,
    Suite,
    Tape,
    for_products,
    shape_text,
)
from adatape_kernels.benchmarks.ops import attention_peers
from adatape_kernels.benchmarks.ops.attention_peers import AttentionInputs
from adatape_kernels.offsets import cumulative


class AttentionShape(NamedTuple):
    B: Size = Size(16)
    N: Span = Span("197")
    T: Size = Size(10)
    tape: Tape = Tape("uniform")
    H: Size = Size(6)
    d: Size = Size(64)


DIRECTIONS = ("forward", "forward+backward")


def inputs(
    shape: AttentionShape, dtype: torch.dtype, device_type: str, backward: bool
) -> AttentionInputs:
    input_lens = torch.tensor(shape.N.lens(shape.B), dtype=torch.int32)
    tape_lens = torch.tensor(shape.tape.lens(shape.B, shape.T), dtype=torch.int32)
    rows = int(input_lens.sum() + tape_lens.sum())
    with torch.device(device_type):
        qkv = torch.randn(rows, 3, shape.H, shape.d).to(dtype).requires_grad_(backward)
        dout = torch.randn(rows, shape.H, shape.d).to(dtype)
    cu_inputs = cumulative(input_lens)
    cu_tapes = cumulative(tape_lens, start=int(cu_inputs[-1]))
    return AttentionInputs(
        qkv,
        dout,
        cu_inputs.to(device_type),
        cu_tapes.to(device_type),
        (input_lens + tape_lens).tolist(),
        backward,
    )


def elastic(given: AttentionInputs) -> Prepared:
    """Prepare our op; C++ attention serves only where it is told the longest example."""
    longest = max(given.lens, default=0)

    def run() -> Tensor:
        q, k, v = given.qkv.unbind(1)
        out = ops.elastic_attention(q, k, v, given.cu_inputs, given.cu_tapes, max_rows=longest)
        return torch.autograd.grad(out, given.qkv, given.dout)[0] if given.backward else out

    return Prepared(run, lambda out: [out.index_select(0, given.order)])


def reference(given: AttentionInputs) -> list[Tensor]:
    exact = given._replace(
        qkv=given.qkv.detach().double().requires_grad_(given.backward), dout=given.dout.double()
    )
    with use_backend("eager"):
        each = elastic(exact)
        return list(each.results(each.run()))


def case(
    shape: AttentionShape, direction: str, dtype: torch.dtype, device_type: str
) -> BenchmarkCase:
    backward = direction == "forward+backward"
    torch.manual_seed(0)
    given = inputs(shape, dtype, device_type, backward)
    products = shape.H * shape.d * sum(n * n for n in given.lens)
    tensor = nbytes([given.dout])
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
            *attention_peers.providers(device_type, dtype, backward),
        ],
        # There are two products forward and five backward. q, k, v and out pass through memory, and
        # in the backward these again, dout and three gradients.
        flops=(14 if backward else 4) * products,
        bytes=(12 if backward else 4) * tensor,
        measured_ops=with_backward("elastic_attention", backward),
    )


def shapes(device_type: str) -> Selection:
    batch = 256 if device_type == "cuda" else 16
    default = [
        f"B={batch} N=197 T=10 H=6",
        f"B={batch} N=50-246 T=10 H=6",
        f"B={batch} N=50-246 T=10 H=12",
        f"B={batch} N=50 T=64 tape=skewed H=12",
    ]
    if device_type == "cuda":
        default += ["B=1 N=197 T=10 H=6", "B=32 N=197 T=10 H=6", "B=512 N=50 T=10 H=12"]
    sweep = [
        f"B={b} N={n} T={t} tape={tape} H={heads}"
        for heads, n, t, tape, b in itertools.product(
            (3, 6, 12, 16),
            (197, 50),
            (10, 32, 64, 128),
            ("zero", "full", "uniform", "skewed"),
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )
    ]
    return Selection(default[1:2], default, sweep)


SUITE = Suite(
    op="elastic_attention",
    shape=AttentionShape,
    directions=DIRECTIONS,
    providers=[*own_kernels(), *attention_peers.NAMES],
    shapes=shapes,
    dtypes=for_products,
    case=case,
)
