"""`adatape-kernels verify`: this package beside results of the public JAX code."""

import os
import subprocess
import sys
from dataclasses import dataclass

from adatape_kernels.cli.exit_codes import EXIT_FAILED, EXIT_UNREADABLE
from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    asked_device,
    chosen_backend,
)
from adatape_kernels.data.printable import printable
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import NotServed
from adatape_kernels.recipes.terminal import say


@dataclass(frozen=True)
class VerifyCommand(BackendOption, DeviceOption):
    """Compare with files of results that the public JAX code computed."""

    files: tuple[str, ...] = option(metavar="FILE", positional=True, by_word=True)
    """Files of results, as in FILE.npz."""


def run(options: VerifyCommand) -> int:
    """Compare every file; 0 all pass, 1 one is over tolerance, 2 one cannot be read."""
    from adatape_kernels.recipes.verify import verify_file

    files, backend = options.files, options.backend
    forced = "" if backend is None else backend.partition(",")[0]
    device = asked_device(options)
    interpreter_is_off = triton_runtime.INSTALLED and not triton_runtime.INTERPRETED
    if backend is not None and forced == "triton" and device.type == "cpu" and interpreter_is_off:
        print("triton on the CPU: its interpreter runs the kernels", flush=True)
        return _in_interpreter("verify", *files, "--backend", backend, "--device", "cpu")
    code = 0
    with chosen_backend(backend):
        for file in files:
            try:
                report = verify_file(file, device)
            except (ValueError, NotServed) as error:
                # What a backend does not serve is not told with a file's name.
                say(str(error) if isinstance(error, ValueError) else f"{printable(file)}: {error}")
                code = EXIT_UNREADABLE
                continue
            print("\n".join(report.lines()))
            if not report.passed:
                code = max(code, EXIT_FAILED)
    return code


def _in_interpreter(*argv: str) -> int:
    """Run the command again where Triton's kernels run on the CPU; return its exit code.

    A process of its own, since triton decides when it is imported.
    """
    command = [sys.executable, "-m", "adatape_kernels.cli", *argv]
    # The interpreter's numpy warns of every NaN and infinity, which kernels have on purpose.
    settings = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    return subprocess.run(command, env={**os.environ, **settings}).returncode
