"""What the last bits of a run's curve depend on beside its options, and where its images are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.devices import device_name
from adatape_kernels.recipes.machine import environment as versions_here
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.execution import Execution

# Entries that runs of earlier versions lack, of which nothing can be said.
_ADDED = ("commit", "python", "numpy")


def run_environment(
    data_dir: str | Path | None, backend: str, device: torch.device, execution: Execution
) -> dict[str, Any]:
    """Return both, in the types that JSON gives back.

    Args:
        data_dir: the images' folder; None for a set without files.
        backend: the backend that serves the model's attention.
        device: where is computed.
        execution: how.
    """
    versions = versions_here(device)
    return {
        "adatape_kernels": versions["adatape_kernels"],
        "commit": versions["commit"],
        "python": versions["python"],
        "numpy": numpy.__version__,
        "torch": versions["torch"],
        "threads": torch.get_num_threads(),
        "backend": backend,
        "device": device_name(device),
        **execution.entries(),
        "processes": execution.ranks.count,
        "data_dir": None if data_dir is None else str(Path(data_dir).resolve()),
    }


def note_differences(saved: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Print to stderr each difference by which the curve may change in the last bits.

    Args:
        saved: what `run_environment` returned when the run was last computed.
        environment: what it returns now.
    """
    added = {name: environment[name] for name in _ADDED}
    known = {"device": "cpu", "processes": 1, **Execution().entries(), **added, **saved}
    for name, value in environment.items():
        before = known.get(name)
        if name != "data_dir" and value != before:
            say(
                f"adatape-kernels: note: {name} was {printable(before)} and is {value}; "
                "the curve may differ in the last bits"
            )
