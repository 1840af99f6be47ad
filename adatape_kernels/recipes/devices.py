"""Where commands compute: a device by its name, and what has to be done otherwise on a GPU.

What is random is drawn on the CPU, images are prepared there, and results come back to it, so that
the same seed gives the same order and the same augmentation on every device.
"""

import os
import re

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import shown
from adatape_kernels.ops.device_facts import OLDEST_CAPABILITY
from adatape_kernels.recipes.distributed.ranks import Ranks

CPU = torch.device("cpu")
_NAME = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
# What cuBLAS asks for under torch's deterministic algorithms, with which all training runs.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def chosen_device(name: str | torch.device, backend: str | None = None) -> torch.device:
    """Return the device that a name stands for.

    Args:
        name: "cpu"; "cuda" for torch's current GPU, or for this process's own where torchrun has
            started several; "cuda:1" for a GPU by its number; or "auto", which is "cuda" where
            torch finds a GPU that the kernels run on, and else "cpu".
        backend: the backend that is forced, as --backend has it; "auto" is the CPU for one that
            runs nowhere else.

    Raises:
        ValueError: this is no such name, or no such device is here.
    """
    text = str(name) if isinstance(name, torch.device) else name
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {shown(text)}")
    if text == "auto":
        on_host = backend is not None and backend.partition(",")[0] == "cpp"
        text = "cuda" if not on_host and _has_usable_gpu() else "cpu"
    if text == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is here, got {text}, and torch finds no GPU")
    gpus = torch.cuda.device_count()
    _, _, number = text.partition(":")
    ranks = Ranks.of_environment()
    own = ranks.local if ranks.several else torch.cuda.current_device()
    index = int(number) if number else own
    if index >= gpus:
        there = "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise ValueError(f"device: expected {there}, got cuda:{index}")
    os.environ.setdefault(*_WORKSPACE)
    return torch.device("cuda", index)


def _has_usable_gpu() -> bool:
    """Return whether torch's current device is a GPU that the kernels run on."""
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= OLDEST_CAPABILITY


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's parameters lie on, the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return CPU if parameter is None else parameter.device


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the copy to a GPU goes on while the host does other things."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, as a clock must."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what reports call a device: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
