"""What a reader needs to place figures: the machine, the versions and the commit."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return machine, versions and commit."""
    from adatape_kernels import __version__

    repository = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "-C", repository, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "machine": f"{platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adatape_kernels": __version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
    }


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
