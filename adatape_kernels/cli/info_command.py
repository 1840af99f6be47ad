"""`adatape-kernels info`: versions, build facts, and which backend serves which calls."""

import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adatape_kernels._build import VERSION
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.compiled_part import FACTS
from adatape_kernels.ops.device_facts import facts_for
from adatape_kernels.ops.fast_autograd import missing_names
from adatape_kernels.ops.op import BACKENDS
from adatape_kernels.ops.support import DEVICES, Support, supported

_SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OP_WIDTH, _CALL_WIDTH, _CELL_WIDTH = 24, 42, 22


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Versions, build facts, and which backend serves which calls on which device."""

    json: bool = False
    """The same for programs."""


def run(options: InfoCommand) -> int:
    """Print what is known, as text or as one JSON object."""
    if options.json:
        print(json.dumps(facts(), indent=1))
        return 0
    known = facts()
    print(f"adatape-kernels {known['version']}, Python {known['python']}")
    print(f"torch {known['torch']}, {known['gpu'] or 'no CUDA device'}, {_triton(known)}")
    print("\ncompiled part")
    for name, value in known["compiled_part"].items():
        print(f"  {name:<18}{value}")
    missing = ", ".join(known["missing_private_names"])
    way = f"torch.library, as this torch lacks {missing}" if missing else "the fast way"
    print(f"\nderivatives are attached by {way}")
    for device in DEVICES:
        here = "" if device == "cpu" or known["gpu"] else f" ({facts_for(device).name})"
        print(f"\ncalls on {device}{here}: dtypes that are served, * by default")
        print("\n".join(table(list(supported(device)))))
    return 0


def facts() -> dict[str, Any]:
    """Return everything that `info` tells, for programs."""
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "triton": triton_runtime.triton.__version__ if triton_runtime.INSTALLED else None,
        "compiled_part": FACTS,
        "missing_private_names": list(missing_names()),
        "calls": [entry._asdict() for device in DEVICES for entry in supported(device)],
    }


def _triton(known: dict[str, Any]) -> str:
    return f"triton {known['triton']}" if known["triton"] else "no triton"


def table(entries: Sequence[Support]) -> Iterator[str]:
    """Yield the lines of a table: a row for each op and kind of call, and the reasons below.

    An op and its backward share rows where they are served alike, and so do kinds of calls.
    """
    reasons: list[str] = []
    columns = "".join(f"{backend:<{_CELL_WIDTH}}" for backend in BACKENDS)
    yield f"  {'op':<{_OP_WIDTH}}{'call':<{_CALL_WIDTH}}{columns}".rstrip()
    previous = ""
    for op, rows in _rows_by_op(entries, reasons).items():
        for cells, calls in rows.items():
            for call in ["any"] if len(rows) == 1 else calls:
                text = "".join(f"{cell:<{_CELL_WIDTH}}" for cell in cells)
                name = "" if op == previous else op
                yield f"  {name:<{_OP_WIDTH}}{call:<{_CALL_WIDTH}}{text}".rstrip()
                previous = op
    for number, reason in enumerate(reasons, start=1):
        yield f"  ({number}) {reason}"
    for backend in BACKENDS:
        lacking = {e.absent for e in entries if e.backend == backend and e.reason is None}
        for absent in sorted(filter(None, lacking)):
            yield f"  {backend} is not in this installation: {absent}"


def _rows_by_op(
    entries: Sequence[Support], reasons: list[str]
) -> dict[str, dict[tuple[str, ...], list[str]]]:
    """Return for each op its kinds of calls by what the cells of their rows say."""
    found: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for op, of_op in itertools.groupby(entries, key=lambda entry: entry.op):
        rows: dict[tuple[str, ...], list[str]] = {}
        for call, of_call in itertools.groupby(of_op, key=lambda entry: entry.call):
            rows.setdefault(tuple(_cells(list(of_call), reasons)), []).append(call)
        forward = op.removesuffix("_bwd")
        if op != forward and found.get(forward) == rows:
            found = {f"{k}, _bwd" if k == forward else k: v for k, v in found.items()}
        else:
            found[op] = rows
    return found


def _cells(entries: Sequence[Support], reasons: list[str]) -> Iterator[str]:
    """Yield each backend's cell: the dtypes that it serves, or the number of its reason."""
    for backend in BACKENDS:
        own = [entry for entry in entries if entry.backend == backend]
        served = [entry for entry in own if entry.reason is None]
        if served:
            yield " ".join(_SHORT[entry.dtype] + "*" * entry.default for entry in served)
            continue
        # A call in float64 is refused for its dtype already; the last reason says more of the call.
        reason = str(own[-1].reason)
        if reason not in reasons:
            reasons.append(reason)
        yield f"({reasons.index(reason) + 1})"
