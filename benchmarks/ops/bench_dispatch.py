"""What each op costs on an input so small that only its overhead is left.

    python benchmarks/bench_dispatch.py

On a GPU calls follow each other without waiting, so that the host's time a call is what shows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ElasticBatch, ops, use_backend
from adatape_kernels.benchmarks.harness.cases import OURS, BenchmarkCase, Prepared, Provider
from adatape_kernels.benchmarks.harness.suites import Selection, Suite, for_reading, shape_text
from adatape_kernels.ops import FFN

OPS = ("tape_select", "tape_gather", "elastic_attention", "dual_ffn")


class Op(str):
    meaning = f"one of {', '.join(OPS)}"

    def __new__(cls, value: object) -> "Op":
        text = super().__new__(cls, value)
        if text not in OPS:
            raise ValueError(value)
        return text


class Shape(NamedTuple):
    op: Op = Op(OPS[0])


def tiny(op: str, device_type: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a call of the op on a few numbers."""
    torch.manual_seed(0)
    with torch.device(device_type):
        query, keys = torch.randn(1, 8).to(dtype), torch.randn(1, 4, 8).to(dtype)
        q, padded = torch.randn(2, 1, 8).to(dtype), torch.randn(1, 2, 8).to(dtype)
        ffn = FFN(*(torch.randn(s).to(dtype) for s in ((8, 8), (8,), (8, 8), (8,))))
    options = {"num_tape_tokens": 1, "topk": 1, "halt_threshold": 1.0}
    selection = ops.tape_select(query, keys, **options)
    x = ElasticBatch.from_padded(padded)
    read = (selection.indices, selection.weights, selection.counts)
    return {
        "tape_select": lambda: ops.tape_select(query, keys, **options).weights,
        "tape_gather": lambda: ops.tape_gather(keys, *read, capacity=1)[0],
        "elastic_attention": lambda: ops.elastic_attention(q, q, q, x.cu_inputs, x.cu_tapes),
        "dual_ffn": lambda: ops.dual_ffn(x.data, 2, ffn),
    }[op]


def case(shape: Shape, direction: str, dtype: torch.dtype, device_type: str) -> BenchmarkCase:
    def elastic(call: Callable[[], Tensor]) -> Prepared:
        return Prepared(call, lambda found: [found])

    def reference(call: Callable[[], Tensor]) -> list[Tensor]:
        with use_backend("eager"):
            return [call()]

    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=lambda: tiny(shape.op, device_type, dtype),
        reference=reference,
        providers=[Provider(OURS, elastic, graph=False)],
        flops=0,
        bytes=0,
        sets=1,
    )


def shapes(device_type: str) -> Selection:
    every = [f"op={op}" for op in OPS]
    return Selection(every, every, every)


SUITE = Suite(
    op="dispatch",
    shape=Shape,
    directions=("forward",),
    providers=[OURS],
    shapes=shapes,
    dtypes=for_reading,
    case=case,
)
