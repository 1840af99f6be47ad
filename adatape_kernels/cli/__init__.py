"""The `adatape-kernels` command: a file a command, with its options as a dataclass."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adatape_kernels._build import VERSION
from adatape_kernels.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREADABLE
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.distributed.one_voice import say_why, spoken_by_rank_0
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.interruptions import interruptible
from adatape_kernels.recipes.options_text import options_text

if TYPE_CHECKING:
    from adatape_kernels.cli.option_parser import OneLineParser

# Parsers are imported where they are made: the benchmarks, which a machine with a GPU runs, need no
# package that makes them.

COMMANDS = {
    "info": "versions, build facts, and which backend serves which calls on which device",
    "check": "compare every kernel with float64 here: can this machine's results be trusted?",
    "verify": "compare with files of results that the public JAX code computed",
    "demo": "train on real digits, compare elastic with padded",
    "train": "train on an image set from local files, with checkpoints",
    "finetune": "fine-tune a pretrained ViT without and with tapes, and compare them",
    "budget": "measure one trained model at many thresholds and longest tapes",
    "heatmap": "draw what a trained model reads",
    "parity": "train AdaTape and its baselines on the parity task, into one table",
    "compare": "train several models at several sizes, accuracy against speed and FLOPs",
    "predict": "classify image files by a trained model",
    "export": "write a trained model for serving",
}
"""The commands, and what the list of them says of each."""

# The commands that train, whose work several processes share under torchrun.
_OF_RANKS = ("train", "demo", "finetune", "parity", "compare")


def command_line(names: Sequence[str] = tuple(COMMANDS)) -> "OneLineParser":
    """Return the parser of all commands, with the options of those that are named."""
    from adatape_kernels.cli.option_parser import SHELLS, CommandParser, OneLineParser

    parser = OneLineParser(prog="adatape-kernels", description="Elastic AdaTape for PyTorch.")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        action=_PrintCompletion,
        default=argparse.SUPPRESS,
        help=f"print what makes {', '.join(SHELLS)} complete commands and options",
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, words in COMMANDS.items():
        own = CommandParser(name, _options_class(name) if name in names else None)
        commands.add_subcommand(name, own, help=words)
        own.prog = f"{parser.prog} {name}"
    # The benchmarks have arguments of their own, in their folder.
    commands.add_subcommand(
        "bench", CommandParser("bench", None), help="measure every op beside its peers"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    # What runs as a program ends with this function.
    with interruptible(for_good=argv is None), spoken_by_rank_0():
        failure: Exception | None = None
        try:
            try:
                if words[:1] == ["bench"]:
                    return _run_bench(words[1:], is_program=argv is None)
                if words and words[0] in COMMANDS:
                    return _run(*words)
                return _run_no_command(words)
            except BrokenPipeError:  # the reader, a `head` perhaps, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return EXIT_FAILED
            except (ValueError, RuntimeError, OSError, MemoryError, ModuleNotFoundError) as error:
                failure = error
                _say_failure(error)
                return EXIT_UNREADABLE
        except KeyboardInterrupt as stop:
            if failure is not None:  # which was about to be said
                _say_failure(failure)
                return EXIT_UNREADABLE
            say_why(": ".join(["adatape-kernels: interrupted", *map(printable, stop.args)]))
            return EXIT_INTERRUPTED


def _say_failure(error: Exception) -> None:
    say_why(f"adatape-kernels: {printable(str(error) or type(error).__name__)}")


def _run(name: str, *words: str) -> int:
    """Run a command with its options, of the command line and of a file."""
    from adatape_kernels.cli.option_parser import CommandParser

    options, file, printed = CommandParser(name, _options_class(name)).options(words)
    if name not in _OF_RANKS and Ranks.of_environment().several:
        names = ", ".join(_OF_RANKS)
        raise ValueError(f"torchrun: expected one of {names}, got {name}")
    command = _module(name)
    try:
        if printed:
            values = command.resolved(options) if hasattr(command, "resolved") else vars(options)
            print(options_text(values), end="")
            return 0
        return command.run(options)
    except ValueError as error:
        if file is None:
            raise
        raise ValueError(file.located(str(error), vars(options))) from None


def _run_no_command(words: Sequence[str]) -> int:
    """Print the help, the version or a shell's script, or what is wrong; the program ends then."""
    parser = command_line(())
    if not words or not words[0].startswith("-"):
        came = repr(words[0]) if words else "none"
        near = difflib.get_close_matches(words[0], COMMANDS, n=1) if words else []
        hint = f", near {near[0]}" if near else ""
        parser.error(f"COMMAND: expected {', '.join(COMMANDS)} or bench, got {came}{hint}")
    parser.parse_args(words)
    parser.error(f"COMMAND: expected it first, got {words[0]}")


def _module(name: str) -> Any:
    """Return the module of a command, which is imported only where the command is asked for."""
    return importlib.import_module(f"adatape_kernels.cli.{name}_command")


def _options_class(name: str) -> type:
    return getattr(_module(name), f"{name.capitalize()}Command")


def _run_bench(argv: Sequence[str], is_program: bool) -> int:
    """Run the benchmarks, which have arguments of their own."""
    # By name, since type checkers do not see that a clone has this package in a folder of its own.
    command = importlib.import_module("adatape_kernels.benchmarks.harness.command")
    return command.program(argv) if is_program else command.main(argv)


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete the commands and their options, and ends the program."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            print(command_line().get_completion_script(f"shtab-{values}"))
        except ValueError:
            parser.error(f"{option}: expected a shell that --help names, got {values!r}")
        parser.exit(0)
