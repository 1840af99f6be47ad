"""Compiles the CUDA C++ kernels for GPUs that are not here and looks at what comes out.

    python -m adatape_kernels.benchmarks.audit.cuda_audit

It runs in a clone, and no kernel runs. Warnings are errors. A kernel has to keep within the
registers that its source states, must not spill, and must hold the instructions that make it fast;
the exit code is 1 where one does not. `make audit` lists these rows below Triton's.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton

from adatape_kernels.benchmarks.audit.audit_bounds import NVCC_BOUNDS, faults_of
from adatape_kernels.benchmarks.audit.generated_code import facts_of_sass
from adatape_kernels.benchmarks.audit.occupancy import CHIPS, MOST_REGISTERS, REGISTERS, WARP

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "nvcc"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

INSTRUCTIONS = {
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mma": r"\bHMMA",
    "cp_async": r"\bLDGSTS",
    "load128": r"\bLDG\.E\.128",
    "store128": r"\bSTG\.E\.128",
}
# A kernel must hold these instructions where its rows are aligned to 16 bytes.
REQUIRED = {
    "tape_gather_kernel": ("load128", "store128"),
    "tape_gather_bwd_kernel": ("load128",),
    "segment_sum_kernel": ("load128",),
    "tape_select_kernel": ("cp_async",),
    "act_kernel": ("load128", "store128"),
    "bias_act_bwd_kernel": ("load128", "store128"),
    "elastic_attention_fwd_kernel": ("mma", "cp_async"),
    "elastic_attention_bwd_kernel": ("mma", "cp_async"),
}


@dataclass(frozen=True)
class NvccRow:
    """The columns that audit_bounds.py looks at."""

    kernel: str
    case: str
    arch: int
    blocks: int
    waves: float
    in_flight: int
    wide: int
    bf16: int
    fp16: int
    tf32: int


def can_compile() -> bool:
    """Return whether nvcc and the sources are here."""
    return shutil.which("nvcc") is not None and (ROOT / "csrc").exists()


def launch_bounds() -> dict[str, tuple[int, int]]:
    """Return threads of a block, and most registers of a thread, by kernel, from the sources."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").rglob("*.cuh")))
    known: dict[str, Any] = {"blocks_at_once": lambda threads, each: REGISTERS // (threads * each)}
    # A constant may stand before those that it is made of, so an expression is tried repeatedly.
    constants = re.findall(r"constexpr int (\w+)\s*=\s*([^;]+);", text)
    for _ in constants:
        for name, expression in constants:
            if set(re.findall(r"[A-Za-z_]\w*", expression)) <= known.keys():
                known.setdefault(name, eval(expression.replace("/", "//"), {}, known))
    found = {}
    for bounds, kernel in re.findall(r"__launch_bounds__\(([^)]*)\)\s*(\w+)\(", text):
        threads, *blocks = (known[name.strip()] for name in bounds.split(","))
        most = REGISTERS // (threads * (blocks[0] if blocks else 1))
        found[kernel] = threads, min(most, MOST_REGISTERS)
    return found


def objects() -> list[Path]:
    """Compile csrc/cuda for every architecture; raises CalledProcessError where that fails."""
    scripts = Path(sys.executable).parent
    tools = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DADATAPE_NVCC=ON"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], env=tools, check=True)
    subprocess.run(["cmake", "--build", BUILD, "--target", "adatape_cuda"], env=tools, check=True)
    return sorted(BUILD.rglob("adatape_cuda.dir/**/*.o"))


def rows() -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield each kernel's columns, which are those of triton_audit's table, and its faults."""
    bounds = launch_bounds()
    for path in objects():
        usage = _sections(path, "-res-usage", r"^ ?Function (\S+):$")
        code = _sections(path, "-sass", r"^\s*Function : (\S+)$")
        for (arch, symbol), text in usage.items():
            columns = _columns(arch, symbol, text, code[arch, symbol])
            kernel = columns["kernel"]
            threads, allowed = bounds[kernel]
            warps = threads // WARP
            # Without a launch its dynamic shared memory is not known, nor how many blocks it has.
            most = CHIPS[arch].blocks_at_once(columns["registers"], warps, columns["shared"])
            columns |= {"num_warps": warps, "num_stages": 0}
            columns |= {"blocks": most, "programs": 0, "waves": 0.0}
            row = NvccRow(**{field.name: columns[field.name] for field in fields(NvccRow)})
            faults = list(faults_of(row, NVCC_BOUNDS))
            if columns["stack"]:
                faults.append(f"spills: {columns['stack']} bytes of stack")
            if columns["registers"] > allowed:
                faults.append(f"registers: {columns['registers']} a thread, stated {allowed}")
            aligned = "false" not in columns["case"]
            for name in REQUIRED.get(kernel, ()) if aligned else ():
                if not columns[name]:
                    faults.append(f"instructions: no {name}")
            yield columns, faults


def _sections(path: Path, option: str, heading: str) -> dict[tuple[int, str], str]:
    """Split what cuobjdump says into the parts of each architecture and kernel."""
    command = [str(CUOBJDUMP), option, str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = {}
    for chip in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        arch = int(re.match(r"\d+", chip)[0])
        _, *named = re.split(heading, chip, flags=re.MULTILINE)
        parts |= {(arch, name): body for name, body in zip(named[::2], named[1::2], strict=True)}
    return parts


def _columns(arch: int, symbol: str, usage: str, code: str) -> dict[str, Any]:
    command = ["c++filt", symbol]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    # A name looks like "void adatape::cuda::kernel<float, true>(Params)".
    kernel, arguments = re.search(r"(\w+)(?:<(.*)>)?\(", name).groups()
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage))
    return {
        "kernel": kernel,
        "case": (arguments or "").replace("__nv_", ""),
        "arch": arch,
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "shared": int(numbers["SHARED"]),
        **{name: len(re.findall(regex, code)) for name, regex in INSTRUCTIONS.items()},
        **asdict(facts_of_sass(code)),
    }


def main() -> int:
    """Print the table; 1 if a kernel has a fault."""
    if not can_compile():
        print("CUDA C++: expected nvcc and a clone of the repository; nothing was compiled")
        return 1
    faults: list[str] = []
    seen = Counter()
    for columns, found in rows():
        label = f"{columns['kernel']}<{columns['case']}>"
        print(f"{label:58}" + "".join(f"{columns[n]:>10}" for n in list(columns)[2:]))
        faults += [f"{label}, sm_{columns['arch']}: {fault}" for fault in found]
        seen[columns["arch"]] += 1
    counts = ", ".join(f"{n} for sm_{arch}" for arch, n in sorted(seen.items()))
    print("\n".join([*faults, f"CUDA C++ kernels compiled: {counts}; {len(faults)} faults"]))
    return 1 if faults or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
