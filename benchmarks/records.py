"""Rows of measurements: one CSV file a machine, one row a timing."""

import csv
import datetime
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from adatape_kernels.recipes.measure import Timing
from adatape_kernels.recipes.report import cpu_name, environment


@dataclass(frozen=True)
class Row:
    """One provider's timing of one case."""

    op: str
    direction: str
    provider: str
    dtype: str
    shape: str
    median_s: float
    p20_s: float
    p80_s: float
    gflops: float | None
    peak_bytes: int | None
    device: str
    threads: int
    torch: str
    commit: str
    date: str


def row(
    op: str,
    direction: str,
    provider: str,
    dtype: str,
    shape: str,
    timing: Timing,
    *,
    flops: float | None = None,
    peak_bytes: int | None = None,
) -> Row:
    """Complete a timing with the machine, the versions, the commit and the date."""
    return Row(
        op,
        direction,
        provider,
        dtype,
        shape,
        timing.median,
        timing.p20,
        timing.p80,
        flops and flops / timing.median / 1e9,
        peak_bytes,
        cpu_name(),
        torch.get_num_threads(),
        torch.__version__,
        environment()["commit"] or "unknown",
        datetime.date.today().isoformat(),
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file, made with its header if it is missing.

    Raises SystemExit, before anything is written, when the file has other columns.
    """
    names = [field.name for field in fields(Row)]
    if path.exists():
        header = path.read_text().partition("\n")[0].split(",")
        if header != names:
            sys.exit(f"{path}: expected the columns {','.join(names)}, got {','.join(header)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if file.tell() == 0:
            writer.writeheader()
        for entry in rows:
            writer.writerow({k: _short(v) for k, v in asdict(entry).items()})


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
