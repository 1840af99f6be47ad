"""`adatape-kernels train`: training on an image set from local files."""

from dataclasses import dataclass
from typing import Any

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    ExecutionOptions,
    LoadingWays,
    ReadingOptions,
    asked_device,
    asked_execution,
    asked_loading,
    chosen_backend,
)
from adatape_kernels.cli.train_options import CurveOptions, ImageOptions, curve_values


@dataclass(frozen=True, kw_only=True)
class TrainCommand(
    DeviceOption,
    BackendOption,
    ReadingOptions,
    LoadingWays,
    ExecutionOptions,
    CurveOptions,
    ImageOptions,
):
    """Train on an image set from local files, with checkpoints."""

    out: str = option("adatape-train", metavar="FOLDER")
    """The run's folder."""
    resume: bool = False
    """Go on from the last checkpoint in --out, up to --epochs where it is given."""
    tensorboard: bool | None = option(None, unset="no, or as the run that goes on")
    """Write scalars and pictures into the folder tensorboard within --out."""
    source: str | None = option(None, metavar="FILE")
    """Begin with a pretrained ViT: a safetensors file of timm or torchvision; with --heads."""
    init: str | None = option(None, metavar="PATH")
    """Begin with a model of this package: a file that save or train wrote, or a run."""


def run(options: TrainCommand) -> int:
    """Train, or go on with a run."""
    from adatape_kernels.recipes.training import train

    with chosen_backend(options.backend):
        train.run(options.out, curve_values(options), **_others(options))
    return 0


def resolved(options: TrainCommand) -> dict[str, Any]:
    """Return the options of a new run with all values that they leave to defaults.

    Raises:
        ValueError: a value is out of range, or is not that of the run or file to begin with.
    """
    from adatape_kernels.recipes.training.run_options import resolved_options

    return {"out": options.out, **resolved_options(curve_values(options), **_others(options))}


def _others(options: TrainCommand) -> dict[str, Any]:
    return {
        "data_dir": options.data_dir,
        "source": options.source,
        "init": options.init,
        "resume": options.resume,
        "tensorboard": options.tensorboard,
        "device": asked_device(options),
        "execution": asked_execution(options),
        "loading": asked_loading(options),
    }
