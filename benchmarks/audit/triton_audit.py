"""Compiles the kernels for GPUs that are not here and looks at what comes out; runs nothing.

    python -m adatape_kernels.benchmarks.audit.triton_audit --sample

Every launch of the audit's cases is recorded on tensors without data, and its Triton kernel is
compiled for compute capability 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0, or for those that --arch names. A
row tells the registers, the stack (spills), the shared memory, and the instructions that make the
kernel fast. The exit code is 1 where a kernel spills, passes a chip's limits, lacks an instruction
that it must have, or needs more than the row that is recorded in audit.csv. Where nvcc is found the
CUDA C++ kernels stand below.
(`adatape-kernels check` runs the kernels of this machine beside float64 results, and
`adatape-kernels verify` compares results with recorded ones of the public JAX code.)
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from adatape_kernels.benchmarks.audit import cuda_audit
from adatape_kernels.benchmarks.audit.again import start_again
from adatape_kernels.benchmarks.audit.audit_cases import CASES, AuditCase
from adatape_kernels.ops import device_facts, triton_runtime

MODULE = "adatape_kernels.benchmarks.audit.triton_audit"
RECORDED = Path(__file__).with_name("audit.csv")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

ARCHS = (80, 86, 89, 90, 100, 120)
# Bytes of shared memory that one block may have, and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
REGISTERS = 65536
# Tiles and bounds on registers are chosen for 8.0, 9.0 and 10.0. For their smaller relatives ptxas
# allots registers otherwise, and some kernels spill two to four of them.
SPILL_LIMIT = {86: 16, 89: 16, 120: 16}
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
class AuditRow:
    """One kernel, compiled for one chip; of an instruction it counts the places in the code."""

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
        """What a row is found again by."""
        return self.kernel, self.case, self.arch

    def faults(self, case: AuditCase, before: "AuditRow | None") -> Iterator[str]:
        """Yield what is wrong with the kernel, on its own and beside the recorded row."""
        if self.stack > SPILL_LIMIT.get(self.arch, 0):
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


PRINTED = [field.name for field in fields(AuditRow) if field.name != "triton"]


class _ChipDriver:
    """As much of a driver as compiling needs: it tells for which chip."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_case(number: int, arch: int) -> list[AuditRow]:
    """Compile the kernels that a case launches, and return a row for each of them."""
    case = CASES[number]
    triton.runtime.driver.set_active(_ChipDriver(arch))
    # Launchers choose tiles by the facts of the device.
    device_facts.EMULATED = device_facts.EMULATED._replace(
        shared_memory_per_block=SHARED_LIMIT[arch], capability=divmod(arch, 10)
    )
    device_facts.facts_of.cache_clear()
    rows: dict[tuple[str, str, int], AuditRow] = {}
    with triton_runtime.recording() as launches, torch.device("meta"):
        case.run()
    for kernel, grid, arguments in launches:
        compiled = kernel.warmup(grid=grid, **arguments)
        code = compiled.asm["ptx"]
        usage = _resources(compiled.asm["cubin"])
        row = AuditRow(
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


def recorded() -> dict[tuple[str, str, int], AuditRow]:
    """Read the committed rows."""
    if not RECORDED.exists():
        return {}
    numbers = [field.name for field in fields(AuditRow) if field.type is int]
    with RECORDED.open(newline="") as file:
        rows = [
            AuditRow(**{**row, **{n: int(row[n]) for n in numbers}}) for row in csv.DictReader(file)
        ]
    return {row.key: row for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", action="store_true", help="a few cases, for sm_90 only")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHS, help="only for these")
    parser.add_argument("--record", action="store_true", help="put the rows into audit.csv")
    options = parser.parse_args(argv)
    if options.record and options.sample:
        parser.error("--record: expected every architecture, got --sample")
    if triton_runtime.INTERPRETED:  # What triton makes for its interpreter cannot be compiled.
        given = sys.argv[1:] if argv is None else argv
        return start_again(MODULE, given, interpreted=False)

    chosen = [
        (number, arch)
        for number, case in enumerate(CASES)
        for arch in options.arch or ((90,) if options.sample else ARCHS)
        if options.match in case.name and (case.sample or not options.sample)
    ]
    before = {} if options.record else recorded()
    print(_line({name: name for name in PRINTED}))
    rows: list[AuditRow] = []
    faults: list[str] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(compile_case, *zip(*chosen, strict=True)) if chosen else ()
        for (number, _), found in zip(chosen, compiled, strict=True):
            for row in found:
                rows.append(row)
                print(_line(asdict(row)), flush=True)
                for fault in row.faults(CASES[number], before.get(row.key)):
                    faults.append(f"{row.kernel}, {row.case}, sm_{row.arch}: {fault}")
    everything = not (options.sample or options.match or options.arch)
    if everything and cuda_audit.can_compile():
        for columns, cuda_faults in cuda_audit.rows():
            print(_line(columns), flush=True)
            faults += [f"{columns['kernel']}, {columns['case']}: {fault}" for fault in cuda_faults]
    if options.record:
        compiled_now = {(CASES[number].name, arch) for number, arch in chosen}
        others = (r for r in recorded().values() if (r.case, r.arch) not in compiled_now)
        _write([*rows, *others])
    print("\n".join(["", *faults, f"{len(rows)} kernels compiled, {len(faults)} faults"]))
    return 1 if faults or not rows else 0


def _line(columns: Mapping[str, Any]) -> str:
    """Return a kernel's columns as a line of the table."""
    cells = "".join(f"{columns[name]:>11}" for name in PRINTED if name not in ("kernel", "case"))
    return f"{columns['kernel']:34}{columns['case']:34}{cells}"


def _write(rows: list[AuditRow]) -> None:
    with RECORDED.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(AuditRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))


if __name__ == "__main__":
    sys.exit(main())
