"""`adatape-kernels parity`: AdaTape and its baselines on the parity task."""

from dataclasses import dataclass, fields

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    JobsOption,
    asked_device,
    chosen_backend,
)
from adatape_kernels.recipes.parity.parity_config import ParityConfig


@dataclass(frozen=True, kw_only=True)
class ParityCommand(DeviceOption, BackendOption, JobsOption, ParityConfig):
    """Train AdaTape and its baselines on the parity task, into one table."""

    out: str = option("adatape-parity", metavar="FOLDER")
    """Where the table is written."""


def run(options: ParityCommand) -> int:
    """Train the table, or what is missing of it."""
    from adatape_kernels.recipes.parity import parity_table

    decided = {field.name: getattr(options, field.name) for field in fields(ParityConfig)}
    backends = options.backend.split(",") if options.backend else ()
    with chosen_backend(options.backend):  # which says what is wrong with the names
        parity_table.run(
            options.out,
            ParityConfig(**decided),
            jobs=options.jobs,
            backends=backends,
            device=asked_device(options),
        )
    return 0
