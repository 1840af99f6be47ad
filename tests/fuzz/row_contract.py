"""Whether a call is valid of the ops whose rows leave and come home, as op_contract.py says."""

import itertools

import torch

from adatape_kernels.op_types import wide_dtype
from fuzz.contract_terms import (
    INT32,
    INT64,
    Open,
    cotangent,
    integer,
    longest_example,
    one_device,
    require,
    tensor,
)


def compact(call, level):
    data = tensor("data", call["data"])
    require(data.dim() == 2, "data has another rank")
    keep = tensor("keep", call["keep"], data.shape[:1], (torch.bool,))
    longest_example(call, len(data), level)
    if call["capacity"] is not None:
        integer("capacity", call["capacity"], 0)
        kept = int(keep[: int(call["cu_tapes"][-1])].sum())
        require(kept <= call["capacity"], "the capacity is too small")


def compact_backward(call, level):
    dpacked = tensor("dpacked", call["dpacked"])
    require(dpacked.dim() == 2, "dpacked has another rank")
    source = tensor("source", call["source"], dpacked.shape[:1], (INT32, INT64))
    one_device(call.values())
    if source.dtype == INT64:
        raise Open("int64 below the public function")
    integer("rows", call["rows"], 0)
    numbers = source.tolist()
    kept = list(itertools.takewhile(lambda n: n != -1, numbers))
    require(all(n == -1 for n in numbers[len(kept) :]), "a row behind unused ones")
    require(all(0 <= n < call["rows"] for n in kept), "source outside the rows")
    require(all(a < b for a, b in itertools.pairwise(kept)), "source does not ascend")


def accumulate(call, level, name="total"):
    """Check a call; `name` is what is shaped like the total that rows are added to."""
    rows = tensor("rows", call["rows"])
    require(rows.dim() == 2, "rows have another rank")
    wide = wide_dtype(rows.dtype)
    total = tensor(name, call[name], None, (rows.dtype, wide))
    require(total.dim() == 2 and total.shape[1] == rows.shape[1], f"{name} has another shape")
    source = tensor("source", call["source"], rows.shape[:1], (INT32, INT64))
    for factor in ("weights", "total_weights"):
        if factor == "weights" or call[factor] is not None:
            tensor(factor, call[factor], rows.shape[:1], (wide,))
    one_device(call.values())
    if level != "public" and source.dtype == INT64:
        raise Open("int64 below the public function")
    numbers = source.tolist()
    require(all(-1 <= n < len(total) for n in numbers), "source outside the total")
    used = [n for n in numbers if n != -1]
    require(len(set(used)) == len(used), "a row of the total twice")


def accumulate_in_place(call, level):
    accumulate(call, level)
    total = call["total"]
    if total.numel():
        most = 1 + sum((n - 1) * s for n, s in zip(total.shape, total.stride(), strict=True))
        places = torch.arange(most).as_strided(total.shape, total.stride())
        require(len(places.unique()) == total.numel(), "two elements of the total at one place")


def accumulate_backward(call, level):
    accumulate(call, level, "dsum")
    dsum, total = call["dsum"], call["total"]
    require(total is not None or call["total_weights"] is None, "total_weights without a total")
    if total is not None:
        cotangent("total", total, dsum)
