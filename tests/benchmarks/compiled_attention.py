"""Prints what attention's kernels in Triton are compiled to for an H100, as JSON; runs nothing.

A process of its own runs this program, because kernels made for triton's interpreter cannot be
compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton

from adatape_kernels.benchmarks.audit import triton_audit
from adatape_kernels.benchmarks.audit.audit_cases import CASES
from adatape_kernels.ops import triton_runtime

NVDISASM = triton_audit.CUOBJDUMP.with_name("nvdisasm")


def instructions(cubin):
    """The names of the instructions, in the order of the code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([NVDISASM, "-c", path], check=True, capture_output=True, text=True)
    return re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text.stdout, re.MULTILINE)


def main():
    triton.runtime.driver.set_active(triton_audit._ChipDriver(90))
    case = next(case for case in CASES if case.name == "64 a head, bf16")
    with triton_runtime.recording() as launches, torch.device("meta"):
        case.run()
    found = {}
    for kernel, grid, arguments in launches:
        compiled = kernel.warmup(grid=grid, **arguments)
        names = instructions(compiled.asm["cubin"])
        waits = re.findall(r"ttg\.async_wait.*num = (\d+)", compiled.asm["ttgir"])
        found[kernel.__name__] = {
            "in flight": [int(n) for n in waits],
            "instructions": names,
            "shared": compiled.metadata.shared,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
