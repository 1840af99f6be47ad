"""The machine, the versions, the commit and the backend that figures were measured with."""

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adatape_kernels.ops.op import record
from adatape_kernels.recipes.devices import CPU, device_name


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Return machine, device, versions and commit, the last None outside a clone of the repository.

    Args:
        device: where was computed.
    """
    from adatape_kernels._build import VERSION

    return {
        "machine": f"{platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adatape_kernels": VERSION,
        "commit": _commit(Path(__file__).resolve().parents[2]),
    }


def _commit(repository: Path) -> str | None:
    """Return the commit of a clone; None where this is installed, perhaps in another's clone."""
    command = ["git", "-C", str(repository), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    top, _, commit = found.stdout.strip().partition("\n")
    return commit if found.returncode == 0 and Path(top) == repository else None


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def attention_backend(run: Callable[[], object]) -> str:
    """Call a function that runs a model; return the backend that served the model's attention."""
    with record() as ran:
        run()
    ops = "elastic_attention_qkvpacked", "elastic_attention"
    return next((call.backend for call in ran if call.op in ops), "none")
