"""What `compact_rows` and `accumulate_rows` promise to the bit."""

import torch

from fuzz.op_tensors import same_bits
from fuzz.verdict import Fault


def check_compacted(call, results, given):
    """Raise Fault unless rows left, were packed, and their gradients came back, all as copies."""
    data, keep, bounds = call["data"], call["keep"].tolist(), call["cu_tapes"].tolist()
    source = [r for r in range(bounds[-1]) if keep[r]]
    kept = len(source)
    capacity = kept if call["capacity"] is None else call["capacity"]
    packed = data.new_zeros(capacity, data.shape[1])
    packed[:kept] = data[source]
    expected = {
        "packed": packed,
        "source": torch.tensor([*source, *[-1] * (capacity - kept)], dtype=torch.int32),
    }
    before = torch.tensor([0, *torch.tensor(keep, dtype=torch.int64).cumsum(0).tolist()])
    for name in ("inputs", "tapes"):
        expected[f"kept_{name}"] = before[call[f"cu_{name}"].long()].int()
    if "ddata" in results:
        expected["ddata"] = torch.zeros_like(data, memory_format=torch.contiguous_format)
        expected["ddata"][source] = given["packed"][:kept]
    for name, x in expected.items():
        if not same_bits(results[name], x):
            raise Fault(f"wrong result {name}", f"{name}: other bits, or another shape or dtype")


def check_accumulated(call, results):
    """Raise Fault unless rows of the total that nothing is added to are what they were."""
    untouched = torch.ones(len(call["total"]), dtype=torch.bool)
    untouched[call["source"][call["source"] >= 0].long()] = False
    if not same_bits(results["sum"][untouched], call["total"][untouched]):
        raise Fault("wrong result sum", "a row of the total changed that nothing is added to")
