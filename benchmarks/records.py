"""Rows of measurements: one CSV file a machine, one row a provider of a case."""

import csv
import datetime
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from adatape_kernels import _triton
from adatape_kernels.recipes.machine import cpu_name, environment
from adatape_kernels.recipes.measure import Timing

RESULTS = Path(__file__).parent / "results"
STATUSES = ("ok", "wrong", "failed", "skipped")


@dataclass(frozen=True)
class Row:
    """One provider of one case; what was not measured is None."""

    op: str
    direction: str
    provider: str
    status: str
    """One of STATUSES; only "ok" is timed."""
    note: str
    """Why it is not ok, or which of its kernels torch chose."""
    dtype: str
    shape: str
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    flops: float | None
    """That the op needs, whoever provides it: a rate speaks of useful work."""
    bytes: float | None
    """That the op must move at least."""
    gflop_per_s: float | None
    gb_per_s: float | None
    percent_of_limit: float | None
    """The time that the machine's measured ceilings allow, over the median."""
    peak_bytes: int | None
    device: str
    threads: int
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What is measured, whoever provides it."""
        return self.op, self.direction, self.dtype, self.shape


COLUMNS = [field.name for field in fields(Row)]
_NUMBERS = {field.name for field in fields(Row) if "float" in str(field.type)}


@dataclass(frozen=True)
class Machine:
    """Where and with what rows are measured: the last columns."""

    device: str
    threads: int
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str

    @property
    def file_name(self) -> str:
        """The CSV file of this machine."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + ".csv"


def machine(device_type: str) -> Machine:
    """Return the facts of this machine, with the GPU or the processor as its device."""
    capability = torch.backends.cpu.get_cpu_capability()
    return Machine(
        torch.cuda.get_device_name() if device_type == "cuda" else f"{cpu_name()}, {capability}",
        torch.get_num_threads(),
        torch.__version__,
        _triton.triton.__version__ if _triton.INSTALLED else "",
        torch.version.cuda or "",
        _commit(),
        datetime.date.today().isoformat(),
    )


@functools.cache
def _commit() -> str:
    return environment()["commit"] or "unknown"


def row(
    case: tuple[str, str, str, str],
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
) -> Row:
    """Complete a measurement with its rates, the machine, the versions, the commit and the date."""
    op, direction, dtype, shape = case
    seconds = timing.median if timing else None
    return Row(
        op,
        direction,
        provider,
        status,
        note,
        dtype,
        shape,
        seconds,
        timing.p20 if timing else None,
        timing.p80 if timing else None,
        flops,
        moved,
        flops / seconds / 1e9 if seconds and flops else None,
        moved / seconds / 1e9 if seconds and moved else None,
        100 * limit_s / seconds if seconds and limit_s else None,
        peak_bytes,
        *astuple(machine(device_type)),
    )


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


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file, made with its header if it is new or empty."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        for entry in rows:
            writer.writerow({name: _short(value) for name, value in asdict(entry).items()})
        file.flush()
        os.fsync(file.fileno())


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """Return a file's rows, in their order.

    Raises:
        ValueError: it cannot be read, or is not a CSV file of these columns.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV file of rows, got {error}") from None
    header, _, _ = text.partition("\n")
    if text and header.strip().split(",") != COLUMNS:
        raise ValueError(
            f"{path}: expected the columns {','.join(COLUMNS)}, got {header.strip()[:200]}"
        )
    rows = []
    for number, entry in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(_row(entry))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected a row at line {number}, got {error}") from None
    return rows


def _row(entry: dict[str, Any]) -> Row:
    values = dict(entry)
    for name in _NUMBERS:
        values[name] = float(values[name]) if values[name] else None
    values["peak_bytes"] = int(values["peak_bytes"]) if values["peak_bytes"] else None
    values["threads"] = int(values["threads"])
    if values["status"] not in STATUSES:
        raise ValueError(f"the status {values['status']!r}")
    if values["status"] == "ok" and not values["median_s"]:
        raise ValueError("no time though its status is ok")
    return Row(**values)


@dataclass(frozen=True)
class Group:
    """A case's rows by provider that were timed in turn: only their ratios mean something."""

    case: tuple[str, str, str, str]
    rows: dict[str, Row]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Return rows as they were timed together, in the order of the file.

    They stand together there, none of the providers twice.
    """
    found: list[Group] = []
    for entry in rows:
        if not found or entry.case != found[-1].case or entry.provider in found[-1].rows:
            found.append(Group(entry.case, {}))
        found[-1].rows[entry.provider] = entry
    return found
