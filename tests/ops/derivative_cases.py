"""Calls of every op as functions of their differentiable arguments, for tests of derivatives."""

import torch

from adatape_kernels.ops import (
    FFN,
    accumulate_rows,
    add_layer_norm,
    compact_rows,
    dual_ffn,
    elastic_attention,
    elastic_attention_qkvpacked,
    tape_gather,
    tape_read,
    tape_select,
)

OFFSETS = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([3, 4, 6], dtype=torch.int32)
INDICES = torch.tensor([[[0, 1], [2, 3]], [[4, 1], [-1, -1]]], dtype=torch.int32)
KEEP = torch.tensor([True, False, True, True, False, True, True])
SOURCE = torch.tensor([3, 0, -1, 4], dtype=torch.int32)
COUNTS = torch.tensor([2, 1], dtype=torch.int32)
READING = {"num_tape_tokens": 3, "topk": 2, "halt_threshold": 1.1}


def select(query, keys, **options):
    read = tape_select(query, keys, **READING, **options)
    return read.weights, read.ponder


def read(query, bank, capacity=None):
    tape, _, selection = tape_read(query, bank, **READING, capacity=capacity)
    return tape, selection.weights, selection.ponder


CASES = {
    "select": (select, ((2, 2), (2, 7, 2))),
    "select, shared keys, max": (
        lambda q, k: select(q, k, loss_type="max", average_query=False),
        ((2, 2), (7, 2)),
    ),
    "gather": (lambda bank, w: tape_gather(bank, INDICES, w, COUNTS)[0], ((2, 5, 4), (2, 2, 2))),
    "gather, capacity": (
        lambda bank, w: tape_gather(bank, INDICES, w, COUNTS, capacity=5)[0],
        ((5, 4), (2, 2, 2)),
    ),
    "read": (read, ((2, 2), (2, 7, 3))),
    "read, capacity": (lambda q, bank: read(q, bank, 6), ((2, 2), (7, 3))),
    "attention": (
        lambda q, k, v: elastic_attention(q, k, v, *OFFSETS),  # the last row is unused
        ((7, 2, 2),) * 3,
    ),
    "attention, packed": (lambda qkv: elastic_attention_qkvpacked(qkv, *OFFSETS), ((7, 3, 2, 2),)),
    "ffn": (
        lambda x, *p: dual_ffn(x, 3, FFN(*p[:4]), FFN(*p[4:]), num_rows=5),
        ((6, 2), (3, 2), (3,), (2, 3), (2,), (4, 2), (4,), (2, 2), (2,)),
    ),
    "ffn, one kind of rows": (
        lambda x, *p: dual_ffn(x, 6, FFN(*p)),
        ((6, 2), (3, 2), (3,), (2, 3), (2,)),
    ),
    "ffn, gelu": (
        lambda x, *p: dual_ffn(x, 3, FFN(*p[:4]), FFN(*p[4:]), activation="gelu"),
        ((6, 2), (3, 2), (3,), (2, 3), (2,), (4, 2), (4,), (2, 2), (2,)),
    ),
    "ffn, relu": (
        lambda x, *p: dual_ffn(x, 6, FFN(*p), activation="relu"),
        ((6, 2), (3, 2), (3,), (2, 3), (2,)),
    ),
    "compact": (lambda data: compact_rows(data, KEEP, *OFFSETS)[0], ((7, 3),)),
    "compact, capacity": (
        lambda data: compact_rows(data, KEEP, *OFFSETS, capacity=5)[0],
        ((7, 3),),
    ),
    "accumulate": (
        lambda total, rows, w: accumulate_rows(total, rows, SOURCE, w),
        ((5, 3), (4, 3), (4,)),
    ),
    "accumulate, both weighted": (
        lambda total, rows, w, v: accumulate_rows(total, rows, SOURCE, w, total_weights=v),
        ((5, 3), (4, 3), (4,), (4,)),
    ),
    "norm": (add_layer_norm, ((4, 5), (4, 5), (5,), (5,))),
}
NAMES = tuple(CASES)


def case(name, dtype=torch.float64):
    """Return the function and its arguments."""
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    return function, tuple(torch.randn(*s, generator=generator, dtype=dtype) for s in shapes)


def scalar(results):
    """Weigh every element of the results otherwise, and not linearly."""
    results = (results,) if isinstance(results, torch.Tensor) else results
    parts = []
    for result in results:
        weights = torch.arange(1, result.numel() + 1, dtype=result.dtype) / result.numel()
        parts.append((weights * (result.flatten() + result.flatten().square())).sum())
    return sum(parts)
