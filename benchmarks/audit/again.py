"""Starts a program again where Triton does, or does not, interpret its kernels.

Triton decides that when it is imported, and a program below `adatape_kernels` has imported it
before its first line runs.
"""

import os
import subprocess
import sys
from collections.abc import Sequence


def start_again(module: str, argv: Sequence[str], *, interpreted: bool) -> int:
    """Run a module in a process of its own, with the interpreter or without; return its code."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    return subprocess.run([sys.executable, "-m", module, *argv], env=environment).returncode
