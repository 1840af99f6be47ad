"""`adatape-kernels check`: every kernel beside float64 on this machine."""

from dataclasses import dataclass

from adatape_kernels.cli.exit_codes import EXIT_FAILED
from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import DeviceOption, asked_device


@dataclass(frozen=True, kw_only=True)
class CheckCommand(DeviceOption):
    """Compare every kernel with float64 here: can this machine's results be trusted?"""

    jobs: int | None = option(
        None,
        unset="1 on a CPU, else three for four cores, up to 12; 1 where the GPU serves one process "
        "at a time",
    )
    """Processes."""


def run(options: CheckCommand) -> int:
    """Check every kernel on a device; 0 all passed, 1 one did not."""
    from adatape_kernels.recipes import check
    from adatape_kernels.recipes.check_jobs import jobs_for

    device = str(asked_device(options))
    jobs = jobs_for(device) if options.jobs is None else options.jobs
    return 0 if check.run(device, jobs) else EXIT_FAILED
