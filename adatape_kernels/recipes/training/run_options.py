"""The options that train a run again, as its folder holds them in a file for `--config`."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.initial_model import InitialModel
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.training.model_options import TAPE_OPTIONS
from adatape_kernels.recipes.training.option_checks import option_name
from adatape_kernels.recipes.training.run_request import RunRequest
from adatape_kernels.recipes.training.run_setup import new_run
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_config import TrainConfig

CONFIG = "config.yaml"
"""Name of the file in a run's folder."""

# No option sets the first two, and the others are files here.
_NO_OPTIONS = ("drop_rest", "draws", "source", "init")


def run_options(
    config: TrainConfig,
    start: SourceFile | InitialModel | None,
    data_dir: str | Path | None,
    execution: Execution,
    loading: Loading,
) -> dict[str, Any]:
    """Return the options of a new run with the values of its defaults, by name on the command line.

    Neither the run's folder nor the device and the backend are among them.

    Args:
        config: what decides the curve.
        start: what the model begins with.
        data_dir: the images' folder, which is made absolute.
        execution: how steps are computed.
        loading: how images are read.
    """
    left_out = {*_NO_OPTIONS, *(() if config.reads else TAPE_OPTIONS)}
    values = {
        option_name(field.name): getattr(config, field.name)
        for field in fields(config)
        if field.name not in left_out
    }
    found = {"data": values.pop("data"), "data-dir": _absolute(data_dir), **values}
    if start is not None:
        found["source" if isinstance(start, SourceFile) else "init"] = _absolute(start.path)
    steps = execution.entries()
    found |= {"compile" if name == "compiled" else name: value for name, value in steps.items()}
    found |= loading.entries()
    if config.draws == "epoch":  # where a number of workers is given, be it 0, images draw alone
        del found["workers"]
    return {name: value for name, value in found.items() if value is not None}


def resolved_options(
    options: Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    source: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    execution: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return `run_options` of the run that `train.run` would begin with these arguments.

    Raises:
        ValueError: a value is out of range, or the run is to go on, whose folder has the file.
    """
    if resume:
        raise ValueError("print-config: expected a new run, got --resume")
    request = RunRequest.of("run", options, data_dir, source, init, False, execution, loading, None)
    start, config = new_run(request)
    steps = Execution.of_run(config.dtype, request.execution)
    return run_options(config, start, data_dir, steps, Loading.of_run(request.loading))


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).resolve())
