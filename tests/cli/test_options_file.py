"""Options in a file: what it may hold, and that everything else is one line with file and line."""

import os

import pytest

from adatape_kernels.cli.option_kinds import OptionKind
from adatape_kernels.cli.options_file import MOST_BYTES, SHIPPED, OptionsFile
from adatape_kernels.recipes.options_text import options_text

pytestmark = pytest.mark.no_backend

KINDS = {
    "epochs": OptionKind(int, optional=True),
    "lr": OptionKind(float),
    "data": OptionKind(str),
    "resume": OptionKind(bool),
    "seeds": OptionKind(int, many=True),
    "models": OptionKind(str, many=True),
    "images": OptionKind(str, many=True, by_word=True),
    "bank": OptionKind(str, choices=("input", "learn")),
    "num_tape_tokens": OptionKind(int),
}


def read(folder, content):
    file = folder / "options.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return OptionsFile.read(str(file), KINDS)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("epochs: 3", {"epochs": 3}),
        ("epochs: null", {"epochs": None}),
        ("epochs:", {"epochs": None}),
        ("lr: 1e-3", {"lr": 0.001}),
        ("lr: 3", {"lr": 3.0}),
        ("lr: .5", {"lr": 0.5}),
        ("lr: -2.5e-05", {"lr": -2.5e-05}),
        ("data: no", {"data": "no"}),
        ("data: 'null'", {"data": "null"}),
        ("data: 1:30", {"data": "1:30"}),
        ("data: !!str 3", {"data": "3"}),
        ("resume: true", {"resume": True}),
        ("seeds: 0,1", {"seeds": (0, 1)}),
        ("seeds: [0, 1]", {"seeds": (0, 1)}),
        ("seeds: 4", {"seeds": (4,)}),
        ("models: vit, avit", {"models": ("vit", "avit")}),
        ("models: [vit]", {"models": ("vit",)}),
        ("images: a,b.png", {"images": ("a,b.png",)}),
        ("bank: learn", {"bank": "learn"}),
        ("num-tape-tokens: 4", {"num_tape_tokens": 4}),
        ("num_tape_tokens: 4", {"num_tape_tokens": 4}),
        ("\ufeff# a comment\n---\ndata: läufe\n", {"data": "läufe"}),
        ("epochs: &n 3\nnum-tape-tokens: *n", {"epochs": 3, "num_tape_tokens": 3}),
    ],
)
def test_plain_values_and_lists_are_taken(tmp_path, text, values):
    found = read(tmp_path, text).values
    assert found == values
    for name, value in values.items():
        assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "epoch: 3",
            "line 1: expected the name of an option, got epoch, which may stand for epochs",
        ),
        ("lr: 1\nquite-another: 3", "line 2: expected the name of an option, got quite-another"),
        ("3: 3", "expected the name of an option, got 3"),
        ("[a]: 3", "expected the name of an option, got a sequence"),
        ("? {a: 1}\n: 3", "expected the name of an option, got a mapping"),
        ("<<: {epochs: 3}", "expected the name of an option, got <<"),
        ("epochs: 3\nepochs: 4", "line 2: epochs: expected it once, got it in line 1 too"),
        ("num-tape-tokens: 3\n\nnum_tape_tokens: 3", "line 3: num-tape-tokens: expected it once"),
        ("\n\nepochs: many", "line 3: epochs: expected an integer, got 'many'"),
        ("epochs: 3.0", "epochs: expected an integer, got 3.0"),
        ("epochs: '3'", "epochs: expected an integer, got '3'"),
        ("epochs: 010", "epochs: expected an integer, got '010'"),
        ("epochs: 1_000", "epochs: expected an integer, got '1_000'"),
        ("epochs: true", "epochs: expected an integer, got True"),
        ("epochs: [3]", "epochs: expected an integer, got [3]"),
        ("epochs: !!int x", "epochs: expected a number, got x"),
        (f"epochs: {'9' * 5000}", "epochs: expected a number, got 999"),
        ("num-tape-tokens: null", "num-tape-tokens: expected an integer, got None"),
        ("lr: .nan", "lr: expected a number, got '.nan'"),
        ("lr: .inf", "lr: expected a number, got '.inf'"),
        ("lr: nan", "lr: expected a number, got 'nan'"),
        ("lr: '0.1'", "lr: expected a number, got '0.1'"),
        ("lr: false", "lr: expected a number, got False"),
        ("data: 3", "data: expected a text, got 3, which quotes would make a text"),
        ("data: true", "data: expected a text, got True, which quotes"),
        ("data: null", "data: expected a text, got None"),
        ("data: {set: digits}", "data: expected a plain value or a list of them, got a mapping"),
        ("resume: yes", "resume: expected true or false, got 'yes'"),
        ("resume: 1", "resume: expected true or false, got 1"),
        ("seeds: 0,,1", "seeds: expected integers with commas between, got '0,,1'"),
        ("seeds: [0, '1']", "seeds: expected a list of integers, got [0, '1']"),
        ("seeds: [[0]]", "seeds: expected a plain value or a list of them, got a sequence"),
        ("seeds: [true]", "seeds: expected a list of integers, got [True]"),
        ("models: [3]", "models: expected a list of names, got [3]"),
        ("bank: both", "bank: expected 'input' or 'learn', got 'both'"),
        ("bank: 3", "bank: expected 'input' or 'learn', got 3"),
        (
            "data: !!python/object/apply:os.system ['true']",
            "got the tag !!python/object/apply:os.system",
        ),
        ("data: !!python/name:os.system ''", "got the tag !!python/name:os.system"),
        (
            "!!python/name:os.system data: 3",
            "line 1: expected the name of an option, got the tag !!python",
        ),
        ("!mine {data: digits}", "expected options, as in `epochs: 3`, got the tag !mine"),
        ("data: !mine digits", "got the tag !mine"),
        (
            "data: 2001-01-01T00:00:00Z\nlr: *gone",
            "line 2: expected YAML, got none: found undefined alias",
        ),
        ("- a", "expected options, as in `epochs: 3`, got a sequence"),
        ("data", "expected options, as in `epochs: 3`, got a scalar"),
        ("", "expected options, got an empty file"),
        ("# nothing", "expected options, got an empty file"),
        ("data: digits\n---\ndata: mnist", "expected YAML, got none: but found another document"),
        ("data: [", "expected YAML, got none: "),
        ("data: 'digits\n", "expected YAML, got none: found unexpected end"),
        ("\tdata: digits", "line 1: expected YAML, got none: found character"),
        ("data: a\x00b", "expected YAML, got none: "),
        (b"lr: 1\ndata: \xff", "line 2: expected UTF-8, got other bytes"),
        (b"\xff\xfed\x00:\x00", "line 1: expected UTF-8, got other bytes"),
        ("[" * 60000, "expected options, got lists within lists"),
        (b"#" * (MOST_BYTES + 1), "which is larger than 64 KiB"),
    ],
)
def test_all_else_is_one_line_with_file_and_place(tmp_path, content, words):
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, content)
    line = str(refusal.value)
    assert "\n" not in line and len(line) < 400
    assert words in line and str(tmp_path / "options.yaml") in line and "expected" in line


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        (tmp_path, "which is no file"),
        (tmp_path / "pipe", "which is no file"),
        ("/dev/zero", "which is no file"),
        (tmp_path / "absent.yaml", "which is not there, nor is it one of imagenet-b32.yaml, "),
        ("absent.yaml", "which is not there"),
        ("../cli/configs/imagenet-s16.yaml", "which is not there"),
        ("", "config: expected a path"),
        ("a\0b", "config: expected a path"),
        ("n" * 5000, "config: expected a file of options"),
    ):
        with pytest.raises(ValueError) as refusal:
            OptionsFile.read(str(name), KINDS)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_of_the_package_is_found_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = dict.fromkeys(("data", "recipe", "variant"), OptionKind(str))
    there = {file.name for file in SHIPPED.iterdir()}
    assert there == {"imagenet-s16.yaml", "imagenet-b32.yaml"}
    for name in there:
        found = OptionsFile.read(name, kinds)
        size = found.values["variant"].replace("/", "").lower()
        assert name == f"imagenet-{size}.yaml" and found.values["recipe"] == "imagenet"
    (tmp_path / "imagenet-s16.yaml").write_text("data: digits")
    assert OptionsFile.read("imagenet-s16.yaml", kinds).values == {"data": "digits"}


def test_an_error_says_where_its_value_stands_unless_the_command_line_gave_it(tmp_path):
    found = read(tmp_path, "data: digits\nnum-tape-tokens: 4\n")
    message = "num-tape-tokens: expected 5, got 4"
    given = {"data": "digits", "num_tape_tokens": 4}
    place = f"{tmp_path / 'options.yaml'}, line 2: "
    assert found.located(message, given) == place + message
    assert found.located(message, {**given, "num_tape_tokens": 7}) == message
    assert found.located("lr: expected 5", given) == "lr: expected 5"
    assert found.located("no option", given) == "no option"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "no",
        "3",
        "1e-3",
        "",
        "a: b # c",
        "ä \u202e \u2028 \x85 \x7f",
        "\U0001f600 \U000e0001",
        'quote " \\ \n',
        "folder-\udcff",
    ],
)
def test_what_is_written_is_read_again(tmp_path, text):
    values = {"data": text, "epochs": None, "lr": 1e-05, "seeds": (0, 7), "resume": False}
    written = options_text(values)
    assert written.count("\n") == 4
    found = read(tmp_path, written).values
    assert found == {name: value for name, value in values.items() if value is not None}
