"""`adatape-kernels check`: every kernel beside float64 on this machine."""

import argparse
from typing import Any

from adatape_kernels.cli.options import EXIT_FAILED, add_device, asked_device


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check",
        help="compare every kernel with float64 here: can this machine's results be trusted?",
    )
    add_device(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes; default: 1 on a CPU, else three for four cores, up to 12; 1 where the GPU "
        "serves one process at a time",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every kernel on a device; 0 all passed, 1 one did not."""
    from adatape_kernels.recipes import check
    from adatape_kernels.recipes.check_jobs import jobs_for

    device = str(asked_device(arguments))
    jobs = jobs_for(device) if arguments.jobs is None else arguments.jobs
    return 0 if check.run(device, jobs) else EXIT_FAILED
