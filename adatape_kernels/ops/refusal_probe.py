"""Whether a refusal that the compiled part raises reaches Python, or ends the process.

    python -m adatape_kernels.ops.refusal_probe

An error in C++ passes through torch on its way. Where the compiler that built the compiled part
brought another C++ runtime than the one that torch runs on, that can end the process. So setup.py
lets a process of its own raise one, and installs no compiled part that ends it.
"""

import functools
import signal
import subprocess
import sys

import torch


def raise_one() -> str:
    """Ask for a bank entry that there is not, below every check in Python; return what is said."""
    entry = torch.tensor([[[9]]], dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    try:
        torch.ops.adatape_cpu.tape_gather(torch.zeros(2, 4), entry, torch.ones(1, 1, 1), one, None)
    except RuntimeError as error:  # so too where there is no compiled part
        return str(error).partition("\n")[0]
    return "nothing was raised"


@functools.cache
def fault() -> str | None:
    """Let another process raise a refusal; return how it ended where it did not outlive that."""
    command = [sys.executable, "-B", "-m", "adatape_kernels.ops.refusal_probe"]
    done = subprocess.run(command, capture_output=True)
    for crash in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        if done.returncode == -crash:
            return f"an error raised in C++ ended the process ({crash.name})"
    return None


if __name__ == "__main__":
    print(raise_one())
