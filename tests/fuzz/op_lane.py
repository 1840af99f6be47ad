"""Runs one case of an op: the call, then what it is compared with."""

import collections
import random

import torch

from adatape_kernels.offsets import cumulative
from adatape_kernels.op_types import FFN
from adatape_kernels.ops.op import record
from fuzz.op_arguments import arguments
from fuzz.op_judgement import judge
from fuzz.op_running import NotRun, run, torch_arguments, with_breakages
from fuzz.op_tensors import between_elements, contiguous, same_bits
from fuzz.verdict import Fault


def run_case(case):
    """Run a case; return how many calls of which op ran, and whether the call was valid."""
    with record() as ran:
        valid = _run(case)
    calls = collections.Counter(f"{each.op}" for each in ran if each.backend == case["backend"])
    return {"calls": dict(calls), "valid": valid}


def _run(case):
    plain = arguments(case)
    call = plain if case["level"] == "public" else torch_arguments(case["op"], plain)
    call = with_breakages(case, call, "forward")
    before = {name: contiguous(value) for name, value in call.items()}
    in_place = case["op"] == "accumulate_rows_"
    gaps = between_elements(call["total"]) if in_place else None
    try:
        results, (status, _) = run(case, call)
    except NotRun:
        return False
    if status != "valid":
        return False
    if in_place:
        if not same_bits(gaps, between_elements(call["total"])):
            raise Fault("wrote outside of its argument", "total")
        call = call | {"total": before["total"].clone()}
    _check_unchanged(case, before, call)
    broken = any(place == "forward" for _, _, place in case["breakages"])
    if case["level"] == "torch" and case["op"] == "dual_ffn":
        if not broken:
            judge(case, plain, _public_names(results, plain))
        return True
    judge(case, call, results)
    if case["strides"] and case["layouts"] and case["op"] != "dual_ffn":
        _check_strides(case, before, results)
    if case["subset"] and case["op"] == "elastic_attention_qkvpacked":
        _check_apart(case, call, results)
    if case["subset"] and case["level"] == "public":
        _check_subset(case, call, results)
    return True


def _public_names(results, call):
    """Rename the gradients of the torch op's parameters to those of the public function's."""
    names = {name: name for name in results}
    for kind, group in (("", "input_ffn"), ("tape_", "tape_ffn")):
        names |= {f"d{kind}{f}": f"d{group}.{f}" for f in FFN._fields}
    return {names[name]: x for name, x in results.items() if name in names}


def _check_unchanged(case, before, call):
    for name, value in call.items():
        pairs = (
            zip(before[name], value, strict=True)
            if isinstance(value, FFN)
            else [(before[name], value)]
        )
        for old, new in pairs:
            if isinstance(new, torch.Tensor) and not same_bits(old, new.detach()):
                raise Fault("changed its argument", name)


def _check_strides(case, dense, results):
    twin = {**case, "dense": True, "breakages": []}
    other, _ = run(twin, dense)
    for name, expected in other.items():
        if not same_bits(results[name], expected):
            raise Fault("strides change bits", f"{name}, {case['layouts']}")


def _check_apart(case, call, results):
    """Compare the bits with those of `elastic_attention` for the three parts of qkv."""
    twin = {**case, "op": "elastic_attention", "breakages": []}
    parts = {n: x for n, x in call.items() if n != "qkv"}
    try:
        apart, _ = run(twin, dict(zip("qkv", call["qkv"].unbind(1), strict=True)) | parts)
    except NotRun:
        return
    if "dqkv" in results:
        apart["dqkv"] = torch.stack([apart.pop(f"d{name}") for name in "qkv"], 1)
    for name, expected in apart.items():
        if not same_bits(results[name], expected):
            raise Fault("packing changes bits", name)


def _check_subset(case, call, results):
    """Compare the bits of some examples, alone and in another order, with what they were."""
    op = case["op"]
    rng = random.Random(case["seed"])
    forward = {**case, "gradients": False, "breakages": []}
    if op in ("elastic_attention", "elastic_attention_qkvpacked"):
        lens = [call[n].diff().tolist() for n in ("cu_inputs", "cu_tapes")]
        chosen = _choose(rng, len(lens[0]))
        order = [r for b in ("cu_inputs", "cu_tapes") for i in chosen for r in _rows(call[b], i)]
        inputs, tapes = (torch.tensor([n[i] for i in chosen], dtype=torch.int64) for n in lens)
        sub = call | {name: call[name][order] for name in ("q", "k", "v", "qkv") if name in call}
        sub |= {"cu_inputs": cumulative(inputs), "cu_tapes": cumulative(tapes, int(inputs.sum()))}
        pairs = {"out": results["out"][order]}
    elif op in ("tape_select", "tape_gather", "tape_read"):
        first = "indices" if op == "tape_gather" else "query"
        chosen = _choose(rng, len(call[first]))
        sub = {name: _of_examples(name, value, chosen) for name, value in call.items()}
        if op != "tape_select":
            sub["capacity"] = None
        pairs = {
            n: results[n][chosen]
            for n in ("indices", "weights", "counts", "ponder")
            if n in results
        }
        if "tape" in results:
            rows = [r for i in chosen for r in _rows(results["offsets"], i)]
            pairs["tape"] = results["tape"][rows]
    elif op == "accumulate_rows":
        chosen = [r for r in _choose(rng, len(call["source"])) if call["source"][r] >= 0]
        places = call["source"][chosen].long()
        per_row = {n: call[n] for n in ("rows", "weights", "total_weights") if call[n] is not None}
        sub = call | {n: x[chosen] for n, x in per_row.items()}
        sub |= {"total": call["total"][places], "source": torch.arange(len(chosen))}
        pairs = {"sum": results["sum"][places]}
    else:
        return
    try:
        alone, _ = run(forward, sub)
    except NotRun:
        return
    for name, expected in pairs.items():
        if not same_bits(alone[name], expected):
            raise Fault("batch changes bits", f"{name} of the examples {chosen}")


def _choose(rng, batch):
    chosen = [i for i in range(batch) if rng.random() < 0.5]
    rng.shuffle(chosen)
    return chosen


def _rows(offsets, example):
    return range(int(offsets[example]), int(offsets[example + 1]))


def _of_examples(name, value, chosen):
    per_example = name not in ("keys", "bank") or value.dim() == 3
    return value[chosen] if isinstance(value, torch.Tensor) and per_example else value
