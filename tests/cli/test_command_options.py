"""The options of every command: a dataclass that the command line and a file fill, and `--help`."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from adatape_kernels import cli
from adatape_kernels.cli import COMMANDS, command_line, main
from adatape_kernels.cli.exit_codes import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNREADABLE,
)
from adatape_kernels.cli.option_parser import CommandParser, options_of
from adatape_kernels.recipes import check
from adatape_kernels.recipes.training import train as train_recipe

pytestmark = pytest.mark.no_backend

# What each command asks for, as words and as entries of a file.
REQUIRED = {
    "verify": {"files": ["a.npz", "b.npz"]},
    "budget": {"source": "runs/a"},
    "heatmap": {"source": "runs/a"},
    "predict": {"source": "runs/a", "images": ["a,b.png"]},
    "export": {"source": "runs/a"},
}
# Another value than the default for each kind of option.
OTHERS = {int: 7, float: 0.5, str: "other", bool: True}


def options_class(name):
    return cli._options_class(name)


def parsed(name, *words):
    return CommandParser(name, options_class(name)).options(words)


def required_words(name):
    return [
        word
        for value in REQUIRED.get(name, {}).values()
        for word in (value if isinstance(value, list) else [value])
    ]


def other_value(name, option):
    """A value that is not the default, which passes the checks of the command's dataclass."""
    if (name, option.name) in {("parity", "lr"), ("parity", "curriculum")}:
        return 0.25
    if option.kind.choices:
        return next(choice for choice in option.kind.choices if choice != option.default)
    if name == "parity" and option.name == "dtype":
        return "bf16"
    if name == "parity" and option.name == "models":
        return ("adatape-fixed-query",)
    value = OTHERS[option.kind.item]
    return (value,) if option.kind.many else value


def command_words(option, value):
    if option.told.get("positional"):
        return [*value] if isinstance(value, tuple) else [str(value)]
    if option.kind.item is bool:
        return [option.flag]
    if option.kind.by_word:
        return [option.flag, *value]
    return [option.flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def as_entry(value):
    return [*value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_and_a_file_fill_the_same_frozen_dataclass(name, tmp_path):
    command = options_class(name)
    plain, file, printed = parsed(name, *required_words(name))
    assert type(plain) is command and (file, printed) == (None, False)
    some = dataclasses.fields(command)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plain, some, None)
    options = options_of(command)
    values = {option.name: other_value(name, option) for option in options}
    places = [o for o in options if o.told.get("positional")]
    named = [o for o in options if not o.told.get("positional")]
    words = [word for o in [*places, *named] for word in command_words(o, values[o.name])]
    by_words, _, _ = parsed(name, *words)
    assert vars(by_words) == values
    entries = cli.options_text({option: as_entry(value) for option, value in values.items()})
    (tmp_path / "all.yaml").write_text(entries)
    by_file, file, _ = parsed(name, "--config", str(tmp_path / "all.yaml"))
    assert by_file == by_words and file.values.keys() == values.keys()
    # The command line goes before the file, wherever the file stands, and leaves the rest.
    for option in named:
        if option.default is None or option.flag == "--no-images":
            continue
        words = command_words(option, option.default)
        if option.kind.item is bool:
            words = [option.flag.replace("--", "--no-")]
        if not option.default and option.kind.many:
            continue
        for line in (
            [*words, "--config", str(tmp_path / "all.yaml")],
            [f"--config={tmp_path / 'all.yaml'}", *words],
        ):
            found, _, _ = parsed(name, *line)
            assert vars(found) == {**values, option.name: option.default}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_text_and_a_default_for_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and EXIT_CODES in text.replace("- ", "-")
    for option in options_of(options_class(name)):
        assert option.text, option.name
        assert "None" not in option.help() and "`" not in option.help(), option.help()
        assert "".join(option.help().split()) in "".join(text.split())
        if option.default not in ((), dataclasses.MISSING):
            assert "; default: " in option.help()
    assert "--config FILE" in text and "--print-config" in text


def test_what_train_leaves_open_says_what_decides_it():
    texts = {option.name: option.help() for option in options_of(options_class("train"))}
    for name, words in {
        "depth": "default: decided by --data, --recipe",
        "lr": "default: decided by --data, --recipe, --source",
        "topk": "default: 4, or by --recipe",
        "seed": "default: 0",
        "batch": "default: chosen by the number of images, or by --recipe",
        "gate_scale": "default: the model's own",
        "compile": "default: no",
        "look": "default: all",
        "out": "default: adatape-train",
    }.items():
        assert texts[name].endswith(words), texts[name]


def test_the_list_of_commands_says_what_each_says_of_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "bench" in text
    for name, words in COMMANDS.items():
        own = options_class(name).__doc__.splitlines()[0].rstrip(".")
        assert words == own[0].lower() + own[1:]
        assert f"{name} {words}" in text


def test_benchmarks_need_no_package_that_makes_parsers():
    script = (
        "import sys\nsys.modules['jsonargparse'] = None\n"
        "from adatape_kernels.cli import main\n"
        "assert main(['info']) == 2\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit as stop:\n    sys.exit(stop.code)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and "bench" in found.stdout, found.stderr
    assert found.stderr.count("\n") == 1 and "jsonargparse" in found.stderr


def test_the_list_of_commands_imports_none_of_them():
    script = (
        "import sys\nfrom adatape_kernels.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.endswith('_command')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND: expected info, check, verify, "),
        (["trian"], "got 'trian', near train"),
        (["--teach"], "unrecognized arguments: --teach"),
        (["train", "--print-cnofig"], "--print-cnofig, near --print-config"),
        (
            ["--print-completion", "csh"],
            "--print-completion: expected a shell that --help names, got 'csh'",
        ),
        (["train", "--epoch", "3"], "unrecognized arguments: --epoch 3, near --epochs"),
        (["train", "--epochs", "3.5"], "--epochs: expected an integer, got '3.5'"),
        (["train", "--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["train", "--epochs"], "--epochs: expected one argument"),
        (["train", "--bank", "both"], "--bank: expected 'input' or 'learn', got 'both'"),
        (["compare", "--seeds", "0,x"], "--seeds: expected integers with commas between, got"),
        (["predict"], "required: source, images"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "--config", "a", "--config=b"], "--config: expected one file, got 2"),
    ],
)
def test_unusable_words_are_one_line_and_2(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    line = capsys.readouterr().err
    assert stop.value.code == EXIT_UNREADABLE == 2
    assert expected in line and line.startswith("adatape-kernels") and line.count("\n") == 1


IMPOSSIBLE = [
    ("topk: 33\n", "line 2: topk: expected 1 to 32, got 33"),
    ("image-size: 400000\n", "line 2: image-size: expected "),
    ("bank: learn\nbank-size: 3\ntopk: 4\n", "line 4: topk: expected at most 3"),
    ("batch: 0\n", "line 2: batch: expected 1 or more, got 0"),
    ("epochs: 0\n", "line 2: epochs: expected 1 or more, got 0"),
    ("lr: -0.1\n", "line 2: lr: expected a number above 0, got -0.1"),
    ("loss: hinge\n", "line 2: loss: expected 'softmax' or 'sigmoid', got 'hinge'"),
    ("model: resnet\n", "line 2: model: expected"),
    ("accumulate: 0\n", "line 2: accumulate: expected 1 to "),
    ("workers: -1\n", "line 2: workers: expected 0 to "),
    ("dim: 30\nheads: 4\n", "line 3: heads: expected a divisor of dim = 30, got 4"),
    ("device: tpu\n", "line 2: device: expected auto, cpu"),
]


OF_BOTH = ("topk: 33", "image-size", "batch", "dim", "device")


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        *(("train", *each) for each in IMPOSSIBLE),
        *(("finetune", *each) for each in IMPOSSIBLE if each[0].startswith(OF_BOTH)),
    ],
)
def test_what_is_impossible_is_refused_before_images_are_read(
    command, text, words, tmp_path, monkeypatch, capsys
):
    def read(*given, **named):
        raise AssertionError("images were read")

    for module in ("run_setup", "train"):
        target = f"adatape_kernels.recipes.training.{module}.load"
        monkeypatch.setattr(target, read, raising=False)
    (tmp_path / "run.yaml").write_text("data: imagefolder\n" + text)
    out = tmp_path / "out"
    line = [command, "--config", str(tmp_path / "run.yaml"), "--out", str(out)]
    assert main([*line, "--data-dir", str(tmp_path / "there")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and str(tmp_path / "run.yaml") in error
    assert not out.exists()
    # The same on the command line names the option, and no file.
    options = [re.match("(.*): (.*)", each).groups() for each in text.splitlines()]
    given = [word for name, value in options for word in (f"--{name}={value}",)]
    try:
        code = main([command, "--data", "imagefolder", *given, "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "run.yaml" not in error
    assert words.split(": ")[1 if "line" in words else 0] in error


def test_parity_and_compare_refuse_a_file_s_values_with_their_place(tmp_path, capsys):
    for command, text, words in (
        ("parity", "steps: 0\n", "line 1: steps: expected 1 to"),
        ("parity", "lengths: [4, 4]\n", "line 1: lengths: expected one or more distinct"),
        ("compare", "data: digits\nsizes: 0\n", "line 2: sizes: expected 1 to"),
        ("compare", "budget: soon\n", "line 1: budget: expected a time such as"),
        ("demo", "epochs: 0\n", "line 1: epochs: expected 1 or more"),
    ):
        file, out = tmp_path / "options.yaml", tmp_path / "out"
        file.write_text(text)
        assert main([command, "--config", str(file), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"{file}, {words}" in error and error.count("\n") == 1 and not out.exists()


def test_print_config_prints_what_a_file_may_hold(capsys, tmp_path):
    assert main(["train", "--data", "cifar10", "--topk", "3", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert 'data: "cifar10"' in text and "topk: 3" in text and "dim: 128" in text
    assert "lr: 0.002" in text and "weight-decay: 0.05" in text
    (tmp_path / "all.yaml").write_text(text)
    again = ["train", "--config", str(tmp_path / "all.yaml"), "--print-config"]
    assert main(again) == 0
    assert capsys.readouterr().out == text
    assert main(["train", "--config", "imagenet-b32.yaml", "--print-config"]) == 0
    text = capsys.readouterr().out
    for line in ('variant: "B/32"', "batch: 4096", "mixup: 0.5", 'loss: "sigmoid"', "epochs: 300"):
        assert line in text
    assert main(["train", "--resume", "--print-config"]) == 2
    assert "print-config: expected a new run" in capsys.readouterr().err
    assert main(["parity", "--seeds", "4", "--print-config"]) == 0
    assert "seeds: [4]\n" in capsys.readouterr().out


def test_exit_codes_are_what_help_says(monkeypatch, capsys, tmp_path):
    assert main(["info", "--json"]) == 0
    monkeypatch.setattr(check, "run", lambda device, jobs: False)
    assert main(["check", "--device", "cpu"]) == EXIT_FAILED == 1
    assert main(["budget", str(tmp_path / "none")]) == EXIT_UNREADABLE == 2

    def interrupted(*given, **named):
        raise KeyboardInterrupt("after epoch 1")

    monkeypatch.setattr(train_recipe, "run", interrupted)
    assert main(["train", "--data", "digits"]) == EXIT_INTERRUPTED == 130
    assert "interrupted: after epoch 1" in capsys.readouterr().err
    for code in (EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED):
        assert re.search(rf"\b{code} ", EXIT_CODES)


COMPLETES = """
source /dev/stdin
complete_line() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _shtab_adatape_kernels
  echo "${COMPREPLY[*]}"
}
complete_line adatape-kernels tra
complete_line adatape-kernels train --ha
complete_line adatape-kernels train --bank ''
complete_line adatape-kernels budget --thr
"""


def test_bash_completes_commands_options_and_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert stop.value.code == 0
    words = ["bash", "-c", COMPLETES]
    done = subprocess.run(words, input=script, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "train",
        "--halt-threshold --halt-threshold-range",
        "input learn",
        "--thresholds",
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_a_script_too(shell, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "halt-threshold" in script and "finetune" in script


def test_words_behind_two_dashes_are_no_options():
    found, file, _ = parsed("predict", "--top", "2", "--", "runs/a", "--config", "-b.png")
    assert (found.images, found.top, file) == (("--config", "-b.png"), 2, None)


def test_the_parser_of_all_commands_takes_a_line():
    found = command_line().parse_args(["train", "--config", "imagenet-s16.yaml", "--epochs", "3"])
    assert found.train.epochs == 3 and found.train.config == "imagenet-s16.yaml"
