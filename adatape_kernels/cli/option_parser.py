"""Parsers of commands, made from frozen dataclasses whose docstrings are the texts of `--help`."""

import argparse
import difflib
import functools
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, NoReturn

import docstring_parser
import jsonargparse
import shtab

from adatape_kernels.cli.exit_codes import EXIT_CODES, EXIT_UNREADABLE
from adatape_kernels.cli.option_kinds import OptionKind
from adatape_kernels.cli.options_file import OptionsFile
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.distributed.one_voice import say_why

# Finds the file among the words of a command line, and leaves the others to the command.
_FILE_FIRST = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
_FILE_FIRST.add_argument("--config", action="append", default=[])

SHELLS = tuple(shtab.SUPPORTED_SHELLS)
"""The shells that can be told how commands and options are completed."""

_NONE = re.compile(r"[.,;] None (?:is|for|until|where) ")

_COMPLETED = {"FILE": shtab.FILE, "IMAGE": shtab.FILE, "FOLDER": shtab.DIRECTORY}
_COMPLETED |= {"RUN": shtab.DIRECTORY, "PATH": shtab.FILE}


def option(
    default: Any = MISSING,
    *,
    metavar: str | None = None,
    unset: str | None = None,
    positional: bool = False,
    by_word: bool = False,
) -> Any:
    """Return a field of a dataclass of options.

    Args:
        default: its value where neither the command line nor a file has one.
        metavar: what stands for a value in `--help`, by which shells complete files and folders.
        unset: what None stands for, in words.
        positional: whether it is given by its place, without its name.
        by_word: whether each value of a tuple is a word of its own, instead of commas between.
    """
    told = {"metavar": metavar, "unset": unset, "positional": positional, "by_word": by_word}
    return field(default=default, metadata=told)


def taken_from(
    config: type,
    names: Collection[str] | None = None,
    *,
    group: str | None = None,
    spelled: Mapping[str, str] | None = None,
    unset: Mapping[str, str] | None = None,
    metavars: Mapping[str, str] | None = None,
) -> Any:
    """Return a frozen dataclass of options that are fields of a configuration, with their texts.

    Args:
        config: a dataclass with a docstring for each field.
        names: which of its fields; None for all.
        group: the heading that they have in `--help`; None for none.
        spelled: options by field where they have another name.
        unset: what decides where an option is not given, in words, by field. With it each of the
            options may be left out, and is None then; without it they have the fields' defaults.
        metavars: what stands for a value in `--help`, by field.
    """
    texts, hints = _texts(config), typing.get_type_hints(config)
    made: list[tuple[str, Any, Field[Any]]] = []
    for each in fields(config):
        if names is not None and each.name not in names:
            continue
        kind, default = hints[each.name], each.default
        told: dict[str, Any] = {"text": texts[each.name], "group": group}
        told["metavar"] = (metavars or {}).get(each.name)
        if unset is not None:
            kind, default = kind | None, None
            told["unset"] = unset[each.name]
        name = (spelled or {}).get(each.name, each.name)
        made.append((name, kind, field(default=default, metadata=told)))
    return make_dataclass(f"OptionsOf{config.__name__}", made, frozen=True, kw_only=True)


@dataclass(frozen=True)
class _Option:
    """A field of a command's dataclass, as a parser takes it."""

    name: str
    kind: OptionKind
    default: Any
    text: str
    told: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: Any) -> None:
        """Declare the option."""
        told: dict[str, Any] = {"help": self.help().replace("%", "%%")}
        names = [self.name if self.told.get("positional") else self.flag]
        required = self.default is MISSING
        if not required:
            told["default"] = list(self.default) if self.kind.by_word else self.default
        if self.kind.item is bool:
            # What is true by a file is made false by the command line, and the other way round.
            told["action"] = jsonargparse.ActionYesNo(no_prefix="no-")
            if self.name.startswith("no_"):
                told["action"] = "store_true"  # which has no counterpart of its own
        else:
            told["type"] = self.kind.of_word
            told["metavar"] = self.told.get("metavar") or self.kind.metavar
            if self.kind.by_word:
                told["nargs"] = "*" if self.told.get("positional") and not required else "+"
        action = parser.add_argument(*names, **told)
        if self.kind.choices:
            action.choices = self.kind.choices
        elif told.get("metavar") in _COMPLETED:
            action.complete = _COMPLETED[told["metavar"]]

    def help(self) -> str:
        """Return the text, and what the default is."""
        # What None stands for says the docstring of a configuration, or whoever takes the field.
        words, *unset = _NONE.split(self.text.rstrip("."), maxsplit=1)
        if self.default is MISSING or self.default == ():
            return words
        default = self.default
        if default is None:
            default = self.told.get("unset") or "".join(unset) or "none"
        elif isinstance(default, bool):
            default = "yes" if default else "no"
        elif isinstance(default, tuple):
            default = ",".join(map(str, default))
        return f"{words}; default: {default}"


def options_of(command: type) -> list[_Option]:
    """Return the options that are a dataclass's fields, those without a group first."""
    texts, hints = _texts(command), typing.get_type_hints(command)
    found = []
    for each in fields(command):
        told = each.metadata
        kind = OptionKind.of(hints[each.name], by_word=told.get("by_word", False))
        text = told.get("text") or texts[each.name]
        found.append(_Option(each.name, kind, each.default, text, told))
    return sorted(found, key=lambda each: each.told.get("group") is not None)


@functools.cache  # which takes a parser of Python's sources
def _texts(command: type) -> Mapping[str, str]:
    """Return the docstrings of the fields of a dataclass and of its bases, as `--help` has them."""
    found = {}
    for base in reversed(command.__mro__[:-1]):
        for each in docstring_parser.parse_from_object(base).params:
            words = " ".join((each.description or "").replace("`", "").split())
            if words.split(" ")[0][1:].islower() or words[1:2] == " ":
                words = words[0].lower() + words[1:]
            found[each.arg_name] = words
    return found


class OneLineParser(jsonargparse.ArgumentParser):
    """A parser that says what is wrong with the arguments in one line.

    Its options are spelled out, since an abbreviation would mean another option one day.
    """

    def __init__(self, **told: Any):
        super().__init__(
            allow_abbrev=False, epilog=EXIT_CODES, formatter_class=argparse.HelpFormatter, **told
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit."""
        text = re.sub(r'^(argument |Parser key "?(?:\w+\.)?)', "", " ".join(message.split()))
        text = text.replace('":', ":", 1) if message.startswith("Parser key") else text
        if text.startswith("unrecognized arguments: "):
            word = text.split(" ")[2].partition("=")[0]
            spelled = [name for name in self._option_string_actions if "_" not in name]
            near = difflib.get_close_matches(word, spelled, n=1)
            text += f", near {near[0]}" if near and word.startswith("-") else ""
        say_why(f"{self.prog}: {printable(text)} (--help lists what there is)")
        self.exit(EXIT_UNREADABLE)


class CommandParser(OneLineParser):
    """The parser of one command, whose options a file fills too."""

    def __init__(self, name: str, command: type | None):
        """Declare the options of a dataclass; none where the command is not asked for."""
        super().__init__(prog=f"adatape-kernels {name}")
        self.command = command
        self.kinds: dict[str, OptionKind] = {}
        if command is None:
            return
        self.description = (command.__doc__ or "").strip().splitlines()[0]
        groups: dict[str | None, Any] = {None: self}
        for each in options_of(command):
            heading = each.told.get("group")
            if heading not in groups:
                groups[heading] = self.add_argument_group(heading)
            each.add_to(groups[heading])
            self.kinds[each.name] = each.kind
        group = self.add_argument_group("options in a file")
        file = group.add_argument(
            "--config",
            metavar="FILE",
            help="YAML whose keys are the options above, which the command line goes before; or "
            "the name of a file that the package brings",
        )
        file.complete = shtab.FILE
        group.add_argument(
            "--print-config",
            action="store_true",
            help="print the options as such a file, do nothing else",
        )

    def options(self, words: Iterable[str]) -> tuple[Any, OptionsFile | None, bool]:
        """Return the command's options, the file that they are of, and whether to print them.

        Raises:
            ValueError: the file holds what is no option, or an option is out of range; the error
                names the file and the line where the value stands there.
        """
        assert self.command is not None
        # Required arguments may be in the file, which is therefore read before the rest is.
        try:
            first, rest = _FILE_FIRST.parse_known_args([*words])
        except argparse.ArgumentError as error:
            self.error(str(error))
        file = None
        if len(first.config) > 1:
            self.error(f"--config: expected one file, got {len(first.config)}")
        if first.config:
            file = OptionsFile.read(first.config[0], self.kinds)
            self.set_defaults(
                {
                    name: list(value) if self.kinds[name].by_word and value is not None else value
                    for name, value in file.values.items()
                }
            )
        found = self.parse_args(rest).as_dict()
        values = {
            name: tuple(found[name]) if kind.by_word and found[name] is not None else found[name]
            for name, kind in self.kinds.items()
        }
        try:
            return self.command(**values), file, bool(found.get("print_config"))
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(file.located(str(error), values)) from None
