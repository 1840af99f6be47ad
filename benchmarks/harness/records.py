"""Rows of measurements: a machine has one CSV file, and each provider of a case has one row."""

import csv
import datetime
import functools
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adatape_kernels.data.printable import printable
from adatape_kernels.ops import triton_runtime
from adatape_kernels.recipes.machine import cpu_name, environment
from adatape_kernels.recipes.measure import Timing
from adatape_kernels.recipes.run_folder import appending_alone

DEFAULT_OUT = Path("adatape-bench")
"""Rows are written into this folder of the current directory unless another is named."""

_MOST_BYTES = 1 << 28

STATUSES = ("ok", "wrong", "failed", "skipped")


class CaseKey(NamedTuple):
    """What is measured, whoever provides it."""

    op: str
    direction: str
    dtype: str
    shape: str


@dataclass(frozen=True)
class ResultRow:
    """One provider of one case; what was not measured is None."""

    op: str
    direction: str
    provider: str
    status: str
    """This is one of STATUSES; only what is "ok" was timed."""
    note: str
    """The reason where the status is not "ok"; else which kernel or which backend served."""
    dtype: str
    shape: str
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    flops: float | None
    """The op needs these whoever provides it, so that a rate speaks of useful work."""
    bytes: float | None
    """The op must move at least these."""
    gflop_per_s: float | None
    gb_per_s: float | None
    percent_of_limit: float | None
    """This is the time that the machine's measured ceilings allow, over the median."""
    peak_bytes: int | None
    device: str
    threads: int
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str

    @property
    def case(self) -> CaseKey:
        """What is measured, whoever provides it."""
        return CaseKey(self.op, self.direction, self.dtype, self.shape)


COLUMNS = [field.name for field in fields(ResultRow)]
_NUMBERS = {field.name for field in fields(ResultRow) if "float" in str(field.type)}


@dataclass(frozen=True)
class Machine:
    """The last columns of a row, which tell where and with what it was measured."""

    device: str
    threads: int
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str

    @property
    def file_name(self) -> str:
        """The name of this machine's CSV file."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + ".csv"


def machine(device_type: str) -> Machine:
    """Return the facts of this machine, with the GPU or the processor as its device."""
    capability = torch.backends.cpu.get_cpu_capability()
    return Machine(
        torch.cuda.get_device_name() if device_type == "cuda" else f"{cpu_name()}, {capability}",
        torch.get_num_threads(),
        torch.__version__,
        triton_runtime.triton.__version__ if triton_runtime.INSTALLED else "",
        torch.version.cuda or "",
        _commit(),
        datetime.date.today().isoformat(),
    )


@functools.cache
def _commit() -> str:
    return environment()["commit"] or "unknown"


def row(
    case: CaseKey,
    provider: str,
    device_type: str,
    *,
    status: str = "ok",
    note: str = "",
    timing: Timing | None = None,
    flops: float | None = None,
    moved: float | None = None,
    limit_s: float | None = None,
    peak_bytes: int | None = None,
) -> ResultRow:
    """Complete a measurement with its rates, the machine, the versions, the commit and the date."""
    seconds = timing.median if timing else None
    return ResultRow(
        op=case.op,
        direction=case.direction,
        provider=provider,
        status=status,
        note=note,
        dtype=case.dtype,
        shape=case.shape,
        median_s=seconds,
        p20_s=timing.p20 if timing else None,
        p80_s=timing.p80 if timing else None,
        flops=flops,
        bytes=moved,
        gflop_per_s=flops / seconds / 1e9 if seconds and flops else None,
        gb_per_s=moved / seconds / 1e9 if seconds and moved else None,
        percent_of_limit=100 * limit_s / seconds if seconds and limit_s else None,
        peak_bytes=peak_bytes,
        **asdict(machine(device_type)),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as it stands in the rows, as "float32"."""
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, as a row's note has it."""
    return str(error).strip().partition("\n")[0]


def destination(out: Path, device_type: str) -> Path:
    """Return the CSV file to write: `out` itself, or this machine's file in the folder `out`.

    Raises:
        ValueError: the file has other columns, or cannot be written.
    """
    path = out if out.suffix == ".csv" else out / machine(device_type).file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            read(path)
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"out: expected a place to write rows, got {path}: {error.strerror}"
        ) from None
    return path


def append(path: Path, rows: Iterable[ResultRow]) -> None:
    """Append rows to a CSV file; a new or empty one gets its header first."""
    with path.open("a", newline="") as file, appending_alone(file):
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        for entry in rows:
            writer.writerow({name: _short(value) for name, value in asdict(entry).items()})
        file.flush()
        os.fsync(file.fileno())


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[ResultRow]:
    """Return a file's rows, in their order.

    Raises:
        ValueError: it cannot be read, or is not a CSV file of these columns.
    """
    name = printable(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a CSV file of rows, got {printable(error, 200)}"
        ) from None
    header, _, _ = text.partition("\n")
    if text and header.strip().split(",") != COLUMNS:
        got = printable(header.strip(), 200)
        raise ValueError(f"{name}: expected the columns {','.join(COLUMNS)}, got {got}")
    lines = csv.DictReader(text.splitlines(), strict=True)
    try:
        return [_row(entry) for entry in lines]
    # The csv module has an error of its own, over quotes that do not end and over long fields.
    except (TypeError, ValueError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{name}: expected a row at line {lines.line_num}, got {printable(error, 200)}"
        ) from None


def _row(entry: dict[str, Any]) -> ResultRow:
    values = dict(entry)
    for name in _NUMBERS:
        values[name] = float(values[name]) if values[name] else None
        if values[name] is not None and not 0 <= values[name] < math.inf:
            raise ValueError(f"{values[name]} as {name}")
    values["peak_bytes"] = int(values["peak_bytes"]) if values["peak_bytes"] else None
    values["threads"] = int(values["threads"])
    if values["status"] not in STATUSES:
        raise ValueError(f"the status {values['status']!r}")
    if values["status"] == "ok" and not values["median_s"]:
        raise ValueError("no time though its status is ok")
    return ResultRow(**values)


@dataclass(frozen=True)
class RowGroup:
    """A case's rows, by provider, that were timed in turn: only their ratios mean something."""

    case: CaseKey
    rows: dict[str, ResultRow]


def groups(rows: Iterable[ResultRow]) -> list[RowGroup]:
    """Return rows as they were timed together, in the order of the file.

    Rows that were timed together follow each other in the file, and each has another provider.
    """
    found: list[RowGroup] = []
    for entry in rows:
        if not found or entry.case != found[-1].case or entry.provider in found[-1].rows:
            found.append(RowGroup(entry.case, {}))
        found[-1].rows[entry.provider] = entry
    return found
