"""A file of options for `--config`: YAML, of which names with plain values and lists are taken.

The file is only composed, by PyYAML: nothing is constructed of it, and a tag is refused.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from adatape_kernels.arguments import check_path
from adatape_kernels.cli.option_kinds import OptionKind
from adatape_kernels.data.printable import printable

SHIPPED = Path(__file__).with_name("configs")
"""Where the files lie that the package brings, which are found by their names alone."""

MOST_BYTES = 1 << 16
_TAG = "tag:yaml.org,2002:"
_NUMBER = r"[-+]?(?:0|[1-9][0-9]*)"


class _PlainLoader(yaml.SafeLoader):
    """Takes true and false, null, and decimal numbers for what they look like, all else for text.

    YAML 1.1, by which PyYAML goes, takes more: no for False, 1:30 for 90, 010 for 8.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _name, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", "n~"),
    ("int", _NUMBER, "-+0123456789"),
    ("float", rf"{_NUMBER}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", "-+0123456789"),
    ("float", r"[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?", "-+."),
):
    _PlainLoader.add_implicit_resolver(
        f"{_TAG}{_name}",
        re.compile(rf"(?:{_pattern})\Z"),
        ["", *_first] if _name == "null" else [*_first],
    )

_VALUES: dict[str, Any] = {
    f"{_TAG}bool": lambda text: text == "true",
    f"{_TAG}null": lambda text: None,
    f"{_TAG}int": int,
    f"{_TAG}float": float,
    f"{_TAG}str": str,
}


@dataclass(frozen=True)
class OptionsFile:
    """What a file says, checked one by one against the options of a command."""

    path: str
    """The file, as an error shows it."""
    values: Mapping[str, Any]
    """Values by option, with `_` between words."""
    lines: Mapping[str, int]
    """The lines where they stand, counted from 1."""

    @classmethod
    def read(cls, name: str, kinds: Mapping[str, OptionKind]) -> "OptionsFile":
        """Read a file.

        Args:
            name: its path; or the name of one that the package brings, where no such file is.
            kinds: what may stand in it, by option with `_` between words.

        Raises:
            ValueError: it cannot be read, or holds what is no option or no value of one. The error
                names the file, the line and the option.

        Example:
            >>> from adatape_kernels.cli.option_kinds import OptionKind
            >>> from adatape_kernels.cli.options_file import OptionsFile
            >>> kinds = dict.fromkeys(("data", "recipe", "variant"), OptionKind(str))
            >>> OptionsFile.read("imagenet-b32.yaml", kinds).values["variant"]
            'B/32'
        """
        path, text = _text_of(name)
        root = _composed(path, text)
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, node in root.value:
            line = key.start_mark.line + 1
            place = f"{path}, line {line}"
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _VALUES:
                raise ValueError(f"{place}: expected the name of an option, got {_came(key)}")
            option = key.value.replace("-", "_")
            if option not in kinds:
                raise ValueError(f"{place}: {_unknown(key.value, kinds)}")
            if option in values:
                raise ValueError(
                    f"{place}: {_spelled(option)}: expected it once, got it in line "
                    f"{lines[option]} too"
                )
            try:
                values[option] = kinds[option].of_entry(
                    _spelled(option), _value(_spelled(option), node)
                )
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            lines[option] = line
        return cls(path, values, lines)

    def located(self, message: str, options: Mapping[str, Any]) -> str:
        """Return an error's text with the place in the file of the value that it is about, if any.

        Args:
            message: an error that begins with the name of an option, or does not.
            options: the values that were taken, some of which may be of the command line.
        """
        option = message.partition(":")[0].replace("-", "_")
        if option not in self.lines or options.get(option) != self.values[option]:
            return message
        return f"{self.path}, line {self.lines[option]}: {message}"


def _text_of(name: str) -> tuple[str, str]:
    """Return a file's path, as it is shown, and its text."""
    path, shown_path = check_path("config", name), printable(name)
    expected = f"config: expected a file of options, got {shown_path}"
    try:
        # A named pipe would be waited for, and a device may never end.
        if path.exists() and not path.is_file():
            raise ValueError(f"{expected}, which is no file")
        if not path.exists() and len(path.parts) == 1:
            path = SHIPPED / name
        with open(path, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        there = ", ".join(sorted(each.name for each in SHIPPED.iterdir()))
        raise ValueError(f"{expected}, which is not there, nor is it one of {there}") from None
    except OSError as error:
        raise ValueError(f"{expected}: {printable(error.strerror or error)}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{expected}, which is larger than {MOST_BYTES >> 10} KiB")
    try:
        return shown_path, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{shown_path}, line {line}: expected UTF-8, got other bytes") from None


def _composed(path: str, text: str) -> yaml.MappingNode:
    """Return the mapping that a text holds. Raises ValueError where it holds another thing."""
    try:
        root = yaml.compose(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = path if mark is None else f"{path}, line {mark.line + 1}"
        raise ValueError(f"{place}: expected YAML, got none: {printable(error.problem)}") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", "what it does not allow")
        raise ValueError(f"{path}: expected YAML, got none: {printable(reason)}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected options, got lists within lists") from None
    if root is None:
        raise ValueError(f"{path}: expected options, got an empty file")
    if not isinstance(root, yaml.MappingNode) or root.tag != f"{_TAG}map":
        raise ValueError(f"{path}: expected options, as in `epochs: 3`, got {_came(root)}")
    return root


def _value(name: str, node: yaml.Node) -> Any:
    """Return the plain value, or the list of such, that a node stands for."""
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_plain(name, each) for each in node.value]
    return _plain(name, node)


def _plain(name: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag in _VALUES:
        try:
            return _VALUES[node.tag](node.value)
        except ValueError:  # a text with an explicit tag, or more digits than Python takes
            raise ValueError(
                f"{name}: expected a number, got {printable(node.value, 80)}"
            ) from None
    raise ValueError(f"{name}: expected a plain value or a list of them, got {_came(node)}")


def _came(node: yaml.Node) -> str:
    """Return what a node is, as an error shows it."""
    if node.tag in (f"{_TAG}seq", f"{_TAG}map") or node.tag in _VALUES:
        return f"a {node.id}"
    return f"the tag {printable(node.tag.replace(_TAG, '!!'), 80)}"


def _unknown(key: str, kinds: Mapping[str, OptionKind]) -> str:
    """Return what is said of a key that is no option, with one that looks like it."""
    near = difflib.get_close_matches(key.replace("-", "_"), kinds, n=1)
    hint = f", which may stand for {_spelled(near[0])}" if near else ""
    return f"expected the name of an option, got {printable(key, 80)}{hint}"


def _spelled(option: str) -> str:
    return option.replace("_", "-")
