"""Compile the Triton kernels for GPUs that are not here: python benchmarks/audit.py [--sample].

Every launch of the cases below is recorded on tensors without data, compiled for compute
capability 8.0, 9.0 and 10.0, and measured: registers, stack (spills), shared memory, and the
instructions that make it fast. Exit code 1 when a kernel spills, passes a chip's limits, lacks an
instruction that it must have, or needs more than the row that is recorded in audit.csv.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# The interpreter's functions cannot be compiled; triton chooses when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import audit_cuda
import torch
import triton
from audit_cases import CASES, Case
from triton.backends.compiler import GPUTarget

from adatape_kernels import _triton

RECORDED = Path(__file__).with_name("audit.csv")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

ARCHS = (80, 90, 100)
# Bytes of shared memory that one block may have, and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536
# A compiler's next version may move a register or two.
SLACK = 8

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "cp_async": r"cp\.async\.c",
    "load128": r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64",
    "store128": r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64",
}


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one chip. Counts of instructions are places in its code."""

    kernel: str
    case: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    tcgen05: int
    mma: int
    cp_async: int
    load128: int
    store128: int
    triton: str

    @property
    def key(self) -> tuple[str, str, int]:
        """By what a row is found again."""
        return self.kernel, self.case, self.arch

    def faults(self, case: Case, before: "Row | None") -> Iterator[str]:
        """Yield what is wrong with the kernel, on its own and beside the recorded row."""
        if self.stack:
            yield f"spills: {self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[self.arch]:
            yield f"shared memory: {self.shared} of {SHARED_LIMIT[self.arch]} bytes"
        if self.registers * self.num_warps * 32 > REGISTERS:
            yield f"registers: {self.registers} a thread do not fit {self.num_warps} warps"
        for name in case.required(self.kernel, self.arch):
            if not getattr(self, name):
                yield f"instructions: no {name}"
        if before is None:
            return
        if self.registers > before.registers + SLACK:
            yield f"registers: {self.registers}, recorded {before.registers}"
        if self.shared > before.shared:
            yield f"shared memory: {self.shared} bytes, recorded {before.shared}"


class _Chip:
    """As much of a driver as compiling needs: which chip it is for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_case(number: int, arch: int) -> list[Row]:
    """Compile each kernel that a case launches, once."""
    case = CASES[number]
    triton.runtime.driver.set_active(_Chip(arch))
    rows: dict[tuple[str, str, int], Row] = {}
    with _triton.recording() as launches, torch.device("meta"):
        case.run()
    for kernel, grid, args, options in launches:
        compiled = kernel.warmup(*args, grid=grid, **options)
        code = compiled.asm["ptx"]
        usage = _resources(compiled.asm["cubin"])
        row = Row(
            kernel.__name__,
            case.name,
            arch,
            compiled.metadata.num_warps,
            compiled.metadata.num_stages,
            usage["REG"],
            usage["STACK"],
            compiled.metadata.shared,
            **{name: len(re.findall(regex, code)) for name, regex in INSTRUCTIONS.items()},
            triton=triton.__version__,
        )
        # A kernel that a case launches in several forms counts by its hungriest.
        known = rows.get(row.key)
        if known is None or (row.stack, row.registers) > (known.stack, known.registers):
            rows[row.key] = row
    return list(rows.values())


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def recorded() -> dict[tuple[str, str, int], Row]:
    """Read the committed rows."""
    if not RECORDED.exists():
        return {}
    numbers = [field.name for field in fields(Row) if field.type is int]
    with RECORDED.open(newline="") as file:
        rows = [Row(**{**row, **{n: int(row[n]) for n in numbers}}) for row in csv.DictReader(file)]
    return {row.key: row for row in rows}


def main() -> int:
    """Print the table; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", action="store_true", help="a few cases, for sm_90 only")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--record", action="store_true", help="put the rows into audit.csv")
    options = parser.parse_args()
    if options.record and options.sample:
        parser.error("--record: expected every architecture, got --sample")

    chosen = [
        (number, arch)
        for number, case in enumerate(CASES)
        for arch in ((90,) if options.sample else ARCHS)
        if options.match in case.name and (case.sample or not options.sample)
    ]
    before = {} if options.record else recorded()
    kept = [row for row in recorded().values() if options.match not in row.case]
    names = [field.name for field in fields(Row) if field.name != "triton"]
    print(f"{'kernel':34}{'case':34}" + "".join(f"{name:>11}" for name in names[2:]))
    rows, faults = [], []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (number, _), found in zip(
            chosen, pool.map(compile_case, *zip(*chosen, strict=True)), strict=True
        ):
            for row in found:
                rows.append(row)
                cells = "".join(f"{getattr(row, name):>11}" for name in names[2:])
                print(f"{row.kernel:34}{row.case:34}{cells}", flush=True)
                for fault in row.faults(CASES[number], before.get(row.key)):
                    faults.append(f"{row.kernel}, {row.case}, sm_{row.arch}: {fault}")
    if not options.sample and not options.match and shutil.which("nvcc"):
        for columns, found in audit_cuda.rows():
            cells = "".join(f"{columns[name]:>11}" for name in names[2:])
            print(f"{columns['kernel']:34}{columns['case']:34}{cells}", flush=True)
            faults += [f"{columns['kernel']}, {columns['case']}: {fault}" for fault in found]
    compiled = len(rows)
    if options.record:
        with RECORDED.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            rows += kept
            writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))
    print("\n".join(["", *faults, f"{compiled} kernels compiled, {len(faults)} faults"]))
    return 1 if faults or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
