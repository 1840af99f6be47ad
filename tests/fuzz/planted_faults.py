"""Faults planted into ops, one of each kind that the tester has to see; `plant` puts them there.

    python -m fuzz.planted_faults

runs the tester on them, and prints what it found as a JSON list of [lane, op, kind, smallest case].
"""

import ctypes
import dataclasses
import json
import time

import torch

_HOG = []


def wrong_number(function):
    """Add a little to a result, where two or more bank tokens are merged."""

    def run(bank, indices, weights, counts, capacity):
        tape, offsets = function(bank, indices, weights, counts, capacity)
        return (tape + 0.01 if indices.shape[2] >= 2 else tape), offsets

    return run


def segmentation_fault(function):
    """Read address 0, where there are two or more rows."""

    def run(x, *rest):
        if len(x) >= 2:
            ctypes.string_at(0)
        return function(x, *rest)

    return run


def hang(function):
    """Come to no end, where five or more tape tokens may be read."""

    def run(query, keys, num_tape_tokens, *rest):
        while num_tape_tokens >= 5:
            time.sleep(1)
        return function(query, keys, num_tape_tokens, *rest)

    return run


def memory_hog(function):
    """Keep a gigabyte for good, where there are thirty or more features."""

    def run(x, *rest):
        if x.shape[1] >= 30:
            _HOG.append(torch.ones(1 << 28))
        return function(x, *rest)

    return run


def unchecked_index(function):
    """Follow offsets wherever they point: attend among all rows, whatever the offsets are."""

    def run(q, k, v, cu_inputs, cu_tapes, *rest):
        rows = torch.tensor([0, len(q)], dtype=torch.int32)
        try:
            return function(q, k, v, cu_inputs, cu_tapes, *rest)
        except ValueError:
            return function(q, k, v, rows, rows[1:].expand(2).contiguous(), None, rest[-1])

    return run


PLANTED = {
    "tape_gather": (wrong_number, "wrong result tape"),
    "add_layer_norm": (segmentation_fault, "signal SIGSEGV"),
    "tape_select": (hang, "hang"),
    "dual_ffn": (memory_hog, "memory"),
    "elastic_attention": (unchecked_index, "accepted an invalid call"),
}

MADE_SMALL = ("tape_gather", "add_layer_norm")
"""The ops whose failing cases are made smaller."""


def plant():
    """Let the backend eager of each of these ops have its fault."""
    from adatape_kernels.ops.op import operation

    for op, (fault, _) in PLANTED.items():
        found = operation(op).implementations["eager"]
        operation(op).replace("eager", dataclasses.replace(found, function=fault(found.function)))


def _is_new(key, found):
    op, kind = key
    return PLANTED.get(op, ("", ""))[1] == kind and key not in found


def main():
    """Run the tester on the planted faults alone, and print what it found."""
    from fuzz.preparation import prepare

    prepare()
    from fuzz import one_case, op_cases, supervisor

    plant()
    op_cases.OPS = tuple(PLANTED)
    one_case.TIMEOUT = 3
    # A seed whose first cases show every kind: each hang takes seconds.
    run = supervisor.Supervisor(["eager"], 184, 2, out=lambda line: None)

    def is_worth_it(key):
        # Each smaller hang takes a second, and each smaller hog its memory.
        run.minimise = 100 if key[1] in MADE_SMALL else 0
        return _is_new(key[1:3], {found[1:3] for found in run.smallest})

    run.worth = is_worth_it
    run.enough = lambda: len(run.smallest) == len(PLANTED)
    run.run(120)
    print(json.dumps([[*key[:3], case] for key, case in run.smallest.items()]))


if __name__ == "__main__":
    main()
