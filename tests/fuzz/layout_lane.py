"""Random layouts of `ElasticBatch`, right and wrong, against lists of rows."""

import itertools

import torch

from adatape_kernels import ElasticBatch
from fuzz.breakages import broken
from fuzz.verdict import Fault, check_refusal, first_line

_CHANGES = ("descending", "shifted", "short_end", "one_negative", "one_beyond", "negative",
            "largest", "longer", "shorter", "rank_up", "dtype float32", "dtype bool")  # fmt: skip


def random_case(rng):
    """Return the rows that examples own and that are appended, and what is wrong with offsets."""
    batch = rng.randint(0, 4)

    def lens():
        return [rng.randint(0, 3) for _ in range(batch)]

    names = ("cu_inputs", "cu_tapes", "offsets")
    return {
        "area": "layouts",
        "kind": "layout",
        "seed": 0,
        "sizes": {"inputs": lens(), "tapes": lens(), "appended": lens()},
        "unused": rng.choice((0, 0, 2)),
        "spare": rng.choice((0, 0, 2)),
        "int64": rng.random() < 0.5,
        "changes": [[rng.choice(_CHANGES), rng.choice(names)]] if rng.random() < 0.6 else [],
    }


def run_case(case):
    """Make the batch and append to it; return whether the layout was valid. Raises Fault."""
    lists = case["sizes"]
    inputs, tapes, appended = lists["inputs"], lists["tapes"], lists["appended"]
    dtype = torch.int64 if case["int64"] else torch.int32
    bounds = {
        "cu_inputs": [0, *itertools.accumulate(inputs)],
        "cu_tapes": list(itertools.accumulate(tapes, initial=sum(inputs))),
        "offsets": [0, *itertools.accumulate(appended)],
    }
    offsets = {name: torch.tensor(values).to(dtype) for name, values in bounds.items()}
    for name, which in case["changes"]:
        offsets[which] = broken(name, offsets[which])
    rows, extra = sum(inputs) + sum(tapes) + case["unused"], sum(appended) + case["spare"]
    data, tape = (
        torch.arange(2.0 * rows).view(rows, 2),
        -torch.arange(1.0, 2 * extra + 1).view(extra, 2),
    )
    valid = _valid(offsets, rows, extra, case)
    try:
        batch = ElasticBatch.from_offsets(
            data, offsets["cu_inputs"], offsets["cu_tapes"], exact=not case["unused"]
        )
        most = max(appended, default=0)
        longer = batch.append_tape(
            tape, offsets["offsets"], max_tapes=most, exact=not case["spare"]
        )
    except Exception as error:
        if valid:
            raise Fault("refused a valid layout", first_line(error)) from error
        check_refusal(error)
        return {"valid": False}
    if not valid:
        raise Fault("accepted a wrong layout", str({n: o.tolist() for n, o in offsets.items()}))
    _compare(longer, data, tape, {name: values.tolist() for name, values in offsets.items()})
    return {"valid": True}


def _valid(offsets, rows, extra, case):
    length = len(case["sizes"]["inputs"]) + 1
    for x in offsets.values():
        if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
            return False
    values = {name: x.tolist() for name, x in offsets.items()}
    inputs, tapes, appended = values["cu_inputs"], values["cu_tapes"], values["offsets"]
    if not len(inputs) == len(tapes) == len(appended) or not length:
        return False
    ends = (
        (inputs, 0, tapes[0] if tapes else 0, True),
        (tapes, inputs[-1] if inputs else 0, rows, not case["unused"]),
        (appended, 0, extra, not case["spare"]),
    )
    for bounds, first, last, exact in ends:
        if not bounds or bounds[0] != first or any(b < a for a, b in itertools.pairwise(bounds)):
            return False
        if bounds[-1] > last or (exact and bounds[-1] != last):
            return False
    return True


def _compare(batch, data, tape, bounds):
    packed, ends = batch.to_packed()
    expected, lens = [], []
    for i in range(len(bounds["offsets"]) - 1):
        own = [data[b[i] : b[i + 1]] for b in (bounds["cu_inputs"], bounds["cu_tapes"])]
        own.append(tape[bounds["offsets"][i] : bounds["offsets"][i + 1]])
        expected += own
        lens.append(sum(map(len, own)))
    rows = torch.cat(expected) if expected else data[:0]
    if ends.diff().tolist() != lens or not torch.equal(packed, rows):
        raise Fault("wrong rows", f"{packed.tolist()}, expected {rows.tolist()}")
    if batch.data.isnan().any():
        raise Fault("unwritten rows", str(batch.data.tolist()))
