"""`adatape-kernels budget`: trained models at many halting thresholds and longest tapes."""

from dataclasses import KW_ONLY, dataclass

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    asked_device,
    chosen_backend,
)


@dataclass(frozen=True)
class BudgetCommand(DeviceOption, BackendOption):
    """Measure one trained model at many thresholds and longest tapes."""

    source: str = option(metavar="RUN", positional=True)
    """Folder of a run of train, or of the demo."""
    _: KW_ONLY
    beside: tuple[str, ...] = option((), metavar="RUN", by_word=True)
    """Further runs on the same images, measured at the same limits."""
    thresholds: tuple[float, ...] | None = option(
        None, unset="seven from 0 to twice the model's own"
    )
    """Halting thresholds."""
    max_tape: tuple[int, ...] | None = option(None, unset="the model's own")
    """Most tape tokens of a read."""
    rounds: int = 5
    """Timings of each."""
    data_dir: str | None = option(None, metavar="FOLDER", unset="where they were")
    """The set's files."""
    out: str = option("adatape-budget", metavar="FOLDER")
    """Where the table and its picture are written."""


def run(options: BudgetCommand) -> int:
    """Measure, and print the table."""
    from adatape_kernels.recipes.budget import budget

    with chosen_backend(options.backend):
        budget.run(
            options.source,
            options.out,
            beside=options.beside,
            thresholds=options.thresholds,
            max_tape=options.max_tape,
            data_dir=options.data_dir,
            rounds=options.rounds,
            device=asked_device(options),
        )
    return 0
