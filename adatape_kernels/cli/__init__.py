"""The `adatape-kernels` command: a file a command, each of which declares its options and runs."""

import importlib
import os
import sys
from collections.abc import Sequence

from adatape_kernels._build import VERSION
from adatape_kernels.cli import (
    budget_command,
    check_command,
    compare_command,
    demo_command,
    export_command,
    finetune_command,
    heatmap_command,
    info_command,
    parity_command,
    predict_command,
    train_command,
    verify_command,
)
from adatape_kernels.cli.options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNREADABLE,
    OneLineParser,
)
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.terminal import say

COMMANDS = (
    info_command,
    check_command,
    verify_command,
    demo_command,
    train_command,
    finetune_command,
    budget_command,
    heatmap_command,
    parity_command,
    compare_command,
    predict_command,
    export_command,
)

# The commands that train, whose work several processes share under torchrun.
_OF_RANKS = ("train", "demo", "finetune", "parity", "compare")


def command_line() -> OneLineParser:
    """Return the parser of all commands and their options."""
    parser = OneLineParser(prog="adatape-kernels", description="Elastic AdaTape for PyTorch.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    # The benchmarks have arguments of their own, in their folder.
    commands.add_parser("bench", help="measure every op beside its peers", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = command_line().parse_args(argv[:1] if argv[:1] == ["bench"] else argv)
    try:
        if arguments.command == "bench":
            return _run_bench(argv[1:])
        if arguments.command not in _OF_RANKS and Ranks.of_environment().several:
            names = ", ".join(_OF_RANKS)
            raise ValueError(f"torchrun: expected one of {names}, got {arguments.command}")
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader, a `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        say(f"adatape-kernels: {printable(str(error) or type(error).__name__)}")
        return EXIT_UNREADABLE
    except KeyboardInterrupt as stop:
        say(": ".join(["adatape-kernels: interrupted", *map(printable, stop.args)]))
        return EXIT_INTERRUPTED


def _run_bench(argv: Sequence[str]) -> int:
    """Run the benchmarks, which have arguments of their own."""
    # By name, since type checkers do not see that a clone has this package in a folder of its own.
    command = importlib.import_module("adatape_kernels.benchmarks.harness.command")
    return command.main(argv)
