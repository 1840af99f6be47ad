"""What the commands share: options of several of them, and what these stand for."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from adatape_kernels.cli.option_parser import option, taken_from
from adatape_kernels.ops.op import use_backend
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading, LoadingOptions


@dataclass(frozen=True, kw_only=True)
class BackendOption:
    """The option that `chosen_backend` reads."""

    backend: str | None = option(
        None, metavar="NAME[,FALLBACK]", unset="the fastest that serves each call"
    )
    """Eager, cpp, triton or cuda, and who takes the calls that it does not serve, as in
    cuda,triton."""


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """The option that `asked_device` reads."""

    device: str = "auto"
    """Cpu, cuda, a GPU by its number as in cuda:1, or auto: cuda where torch finds a GPU of compute
    capability 8.0 or newer, else cpu."""


@dataclass(frozen=True, kw_only=True)
class JobsOption:
    """The option of commands that train several runs."""

    jobs: int | None = option(None, unset="one a core, and 1 on a GPU")
    """Runs at a time, a thread each."""


_EXECUTION = {"accumulate": "1", "parallel": "ddp"}
_EXECUTION |= dict.fromkeys(("checkpoint_layers", "compiled", "graph"), "no")

ExecutionOptions: Any = taken_from(
    Execution,
    _EXECUTION,
    group="execution: changes a curve by rounding alone",
    spelled={"compiled": "compile"},
    unset=_EXECUTION,
)
"""How steps are computed, which `asked_execution` returns."""

_LOADING = {"workers": "0", "look": "all"}
_READING = {"unreadable": "stop", "unreadable_limit": "100"}
_HEADING = "reading images"

LoadingWays: Any = taken_from(Loading, _LOADING, group=_HEADING, unset=_LOADING)
"""How images are read, as far as no curve depends on it, which `asked_loading` returns."""

ReadingOptions: Any = taken_from(LoadingOptions, _READING, group=_HEADING, unset=_READING)
"""What becomes of images that cannot be read, by which a curve changes."""


def chosen_backend(text: str | None) -> contextlib.AbstractContextManager[None]:
    """Return `use_backend` for the names, of which the first is forced and the others fall back."""
    if text is None:
        return use_backend(None)
    name, *fallback = text.split(",")
    return use_backend(name, fallback)


def asked_device(options: Any) -> torch.device:
    """Return the device that is asked for. Raises ValueError where it is none, or is not here."""
    return chosen_device(options.device, getattr(options, "backend", None))


def asked_execution(options: Any) -> dict[str, Any]:
    """Return values by field of Execution, but for the dtype."""
    spelled = {"compiled": "compile"}
    return {name: getattr(options, spelled.get(name, name)) for name in _EXECUTION}


def asked_loading(options: Any) -> dict[str, Any]:
    """Return values by field of Loading."""
    return {name: getattr(options, name) for name in _LOADING}
