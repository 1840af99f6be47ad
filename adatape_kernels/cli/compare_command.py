"""`adatape-kernels compare`: AdaTape beside other models, accuracy against speed and FLOPs."""

from dataclasses import dataclass, fields
from typing import Any

from adatape_kernels.cli.option_parser import option, taken_from
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    JobsOption,
    LoadingWays,
    ReadingOptions,
    asked_device,
    asked_loading,
    chosen_backend,
)
from adatape_kernels.recipes.compare.compare_config import (
    SHARED_OPTIONS,
    CompareConfig,
    seconds_of,
)
from adatape_kernels.recipes.training.train_config import TrainConfig

_BUDGET = "20m"

_Compared: Any = taken_from(
    CompareConfig,
    {field.name for field in fields(CompareConfig)} - {"budget", "options"},
    metavars={"data": "SET"},
)
_OF_TRAIN = {name for name in SHARED_OPTIONS if not name.startswith("unreadable")}
_Shared: Any = taken_from(
    TrainConfig,
    _OF_TRAIN,
    group="of every model that is trained",
    unset=dict.fromkeys(_OF_TRAIN, "that of train"),
)


@dataclass(frozen=True, kw_only=True)
class CompareCommand(
    DeviceOption, BackendOption, ReadingOptions, LoadingWays, _Shared, JobsOption, _Compared
):
    """Train several models at several sizes, accuracy against speed and FLOPs."""

    data_dir: str | None = option(
        None, metavar="FOLDER", unset="none; for fashion-mnist where Debian's package puts them"
    )
    """The set's files."""
    budget: str | None = option(None, metavar="TIME", unset=f"{_BUDGET}, or by --epochs")
    """How long all of it may take, as in 90s, 20m or 1h30m, by which the number of epochs is
    chosen."""
    out: str = option("adatape-compare", metavar="FOLDER")
    """Where the table is written."""

    def config(self) -> CompareConfig:
        """Return what decides the comparison. Raises ValueError where a value is out of range."""
        given: Any = self
        text = given.budget
        if text is None and given.epochs is None:
            text = _BUDGET
        return CompareConfig(
            **{field.name: getattr(given, field.name) for field in fields(_Compared)},
            budget=None if text is None else seconds_of(text),
            options={name: getattr(given, name) for name in SHARED_OPTIONS},
        )


def run(options: CompareCommand) -> int:
    """Train and measure, or what is missing of it."""
    from adatape_kernels.recipes.compare import compare

    backends = options.backend.split(",") if options.backend else ()
    config = options.config()
    with chosen_backend(options.backend):  # which says what is wrong with the names
        compare.run(
            options.out,
            config,
            data_dir=options.data_dir,
            jobs=options.jobs,
            backends=backends,
            device=asked_device(options),
            loading=asked_loading(options),
        )
    return 0
