"""Files of a run that were altered: one line that names the file, or the same result."""

import dataclasses
import json
import math
import random

import pytest
import torch
from checkpoints import in_format_1
from image_files import write_folder, write_mnist

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import INDEX
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.epoch_metrics import METRICS
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.training.saved_run import saved_run
from adatape_kernels.recipes.training.train_config import TrainConfig

TINY = ["--patch", "14", "--bank-patch", "7", "--dim", "8", "--depth", "1", "--heads", "2"]
TINY += ["--ffn", "8", "--num-tape-tokens", "2", "--topk", "2", "--batch", "20", "--epochs", "2"]
TENSORS = "checkpoint-2.safetensors"


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder, train=40, test=10)
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    """A run of two epochs without a report."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "write_report", lambda *arguments, **options: None)
        words = ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out), *TINY]
        assert main(words) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def run(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name, content in finished.items():
        (out / name).write_bytes(content)
    return out


def state(out):
    """What a run goes on with; the checks of `train --resume` before it looks at the images."""
    saved = saved_run(out, {})
    tensors = {name: tensor.numpy().tobytes() for name, tensor in saved.tensors.items()}
    entries = {k: v for k, v in vars(saved).items() if k != "tensors"}
    return json.dumps(entries), tensors


def noticed(out, *names):
    """Return whether resuming ends in one line, which names one of the files."""
    try:
        state(out)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, message
        assert any(str(out / name) in message for name in names), message
        return True
    return False


def mutants(content, count, seed):
    """Yield a content with a bit flipped, a byte changed, cut, left out or written twice."""
    draw = random.Random(seed)
    for number in range(count):
        place = draw.randrange(len(content))
        before, byte, after = content[:place], content[place], content[place + 1 :]
        yield (
            before + bytes([byte ^ 1 << draw.randrange(8)]) + after,
            before + bytes([byte ^ 1 << draw.randrange(8)]) + after,
            before
            + bytes([draw.choice([c for c in b'0123456789".,{}[]-eE' if c != byte])])
            + after,
            before,
            before + after,
            before + bytes([byte, byte]) + after,
        )[number % 6]


def test_a_bit_of_the_index_is_noticed(run, finished):
    """Every bit was tried; to save time every seventh is, and so each of the eight of a byte."""
    whole = finished[INDEX]
    for place in range(0, 8 * len(whole), 7):
        altered = bytearray(whole)
        altered[place // 8] ^= 1 << place % 8
        (run / INDEX).write_bytes(altered)
        assert noticed(run, INDEX), (place, bytes(altered[place // 8 - 20 : place // 8 + 20]))


@pytest.mark.parametrize("name", [INDEX, TENSORS])
def test_other_mutants_are_noticed(run, finished, name):
    for content in mutants(finished[name], 2000, seed=1):
        if content != finished[name]:
            (run / name).write_bytes(content)
            assert noticed(run, name)


def test_what_is_written_only_is_written_again(run, finished, mnist):
    expected = state(run)
    rows = finished["metrics.csv"]
    for content in [b"", b"\xff" * 9, *mutants(rows, 4, seed=2)]:
        (run / "metrics.csv").write_bytes(content)
        assert main(["train", "--resume", "--out", str(run)]) == 0
        assert state(run) == expected and (run / "metrics.csv").read_bytes() == rows


VALUES = [None, True, False, 0, -1, 1, 2.5, 8.0, 48.5, math.nan, math.inf, -math.inf, 10**30, 1e308]
VALUES += ["", "8", "x\ny", "\ud800", "a\0b", [], [1], {}, {"a": 1}, "NaN", 10**400, 5]


def places(entry, path=()):
    """Yield the path to each value within a JSON document."""
    yield path
    if not isinstance(entry, (dict, list)):
        return
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
        yield from places(value, (*path, key))


def replaced(entry, path, value):
    if not path:
        return value
    copy = dict(entry) if isinstance(entry, dict) else list(entry)
    copy[path[0]] = replaced(entry[path[0]], path[1:], value)
    return copy


def without(entry, path):
    copy = dict(entry) if isinstance(entry, dict) else list(entry)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(entry[path[0]], path[1:])
    return copy


@pytest.mark.parametrize("format_number", [1, 2])
def test_every_field_is_checked_where_no_checksum_tells(run, finished, format_number):
    """A former checkpoint has none, and this one is that of the altered entries."""
    index = json.loads(finished[INDEX])
    index.pop("sha256 of this file")
    if format_number == 1:
        index = json.loads(in_format_1(index))
    everything = [path for path in places(index) if path]
    altered = [(path, replaced(index, path, value)) for path in everything for value in VALUES]
    altered += [(path, without(index, path)) for path in everything]
    count = 0
    for path, entries in altered:
        content = checkpoint.sealed(entries) if format_number == 2 else json.dumps(entries).encode()
        (run / INDEX).write_bytes(content)
        if noticed(run, INDEX, TENSORS):
            count += 1
            continue
        # The rest is compared with the images, is free, or is another value of the same kind.
        if path[0] == "best":  # which an earlier version has not written, or not from the start
            assert path == ("best", "since") or "best" not in entries
            continue
        assert path[0] in ("data", "environment", "step") or path[0] in ("config", "history"), path
        if path[0] == "config" and len(path) > 1 and path[1] in entries["config"]:
            TrainConfig.of_saved(
                {**json.loads(finished[INDEX])["config"], **{path[1]: entries["config"][path[1]]}}
            )
    assert count > 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 2.5),
        ("variant", 5),
        ("limit", 48.5),
        ("dim", 8.0),
        ("depth", 10**30),
        ("lr", True),
        ("image_size", 32),
        ("variant", ""),
        ("patch", None),
        ("seed", 1 << 32),
        ("drop_rest", 1),
        ("data", ["mnist"]),
        ("halt_threshold", True),
    ],
)
def test_an_option_that_no_command_line_takes(run, finished, capsys, name, value):
    index = json.loads(in_format_1(json.loads(finished[INDEX])))
    index["config"][name] = value
    (run / INDEX).write_text(json.dumps(index))
    assert main(["train", "--resume", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run / INDEX) in error, error
    assert f"{name.replace('_', '-')}: expected" in error or "depth" in error, error


def test_what_is_compared_with_the_images(run, finished, capsys):
    index = json.loads(finished[INDEX])
    goes_on_with = Execution().entries() | Loading().entries()
    for part in ("data", "environment"):
        for name in index[part]:
            for value in (None, 5, "x", [], {"a": 1}, False):
                altered = {**index, part: {**index[part], name: value}}
                (run / INDEX).write_bytes(checkpoint.sealed(altered))
                code = main(["train", "--resume", "--out", str(run)])
                error = capsys.readouterr().err
                assert "Traceback" not in error and "\n\n" not in error
                if part == "data" or (name == "data_dir" and value is not None):
                    assert code == 2 and str(run / INDEX) in error and error.count("\n") == 1
                elif name in goes_on_with and code == 2:  # a value that there cannot be
                    assert str(run / INDEX) in error and error.count("\n") == 1
                elif name in goes_on_with:  # the run goes on with it
                    assert code == 0 and f"note: {name}" not in error
                elif name != "data_dir":
                    assert code == 0 and f"note: {name} was {value}" in error
    (run / INDEX).write_bytes(checkpoint.sealed({**index, "step": 3}))
    assert main(["train", "--resume", "--out", str(run)]) == 2
    assert f"{run / INDEX}: expected step 4" in capsys.readouterr().err


def test_a_former_checkpoint_resumes_and_becomes_a_present_one(run, finished, mnist, monkeypatch):
    expected = state(run)
    index = json.loads(in_format_1(json.loads(finished[INDEX])))
    (run / INDEX).write_text(json.dumps(index))
    entries, tensors = state(run)
    assert tensors == expected[1] and checkpoint.load(run).format == 1
    assert json.loads(entries)["config"] == json.loads(expected[0])["config"]
    stopped = {**index, "history": index["history"][:0], "epoch": 0, "step": 0}
    (run / INDEX).write_text(json.dumps(stopped))
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert checkpoint.load(run).format == 2
    assert tuple(json.loads((run / INDEX).read_text())["history"][0]) == METRICS


def test_other_images_and_labels_of_the_same_number_are_noticed(run, mnist, tmp_path, capsys):
    for name, words in (
        ("train-labels-idx1-ubyte", "training labels"),
        ("t10k-labels-idx1-ubyte", "test labels"),
        ("t10k-images-idx3-ubyte", "test images"),
    ):
        other = tmp_path / name
        other.mkdir()
        for file in mnist.iterdir():
            content = bytearray(file.read_bytes())
            if file.name.startswith(name):
                assert file.name == name
                content[-1], content[-2] = content[-1] ^ 1, content[-2] ^ 1
            (other / file.name).write_bytes(content)
        assert main(["train", "--resume", "--out", str(run), "--data-dir", str(other)]) == 2
        assert f"data-dir: expected the {words} that the run of" in capsys.readouterr().err


def test_a_folder_of_images_is_known_by_names_and_sizes(tmp_path, capsys):
    photos = tmp_path / "photos"
    write_folder(photos, classes=("cat", "dog"), count=6)
    words = ["train", "--data", "imagefolder", "--data-dir", str(photos), *TINY]
    assert main([*words, "--image-size", "14", "--out", str(tmp_path / "run")]) == 0
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(resume) == 2
    assert (
        f"data-dir: expected the folder that {tmp_path / 'run' / INDEX}" in capsys.readouterr().err
    )
    resume += ["--data-dir", str(moved)]
    assert main(resume) == 0
    # The names of two images of different classes change places.
    cat, dog = sorted((moved / "cat").iterdir())[0], sorted((moved / "dog").iterdir())[0]
    content = cat.read_bytes()
    cat.write_bytes(content + b"more")
    capsys.readouterr()
    assert main(resume) == 2
    assert "images that the run of" in capsys.readouterr().err
    cat.write_bytes(content)
    assert main(resume) == 0
    dog.rename(dog.with_name("0 other name.png"))
    assert main(resume) == 2


def test_a_limited_set_is_hashed_as_it_is_used(mnist, tmp_path):
    words = ["train", "--data", "mnist", "--data-dir", str(mnist), *TINY, "--limit", "30"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    facts = checkpoint.load(tmp_path / "run").data
    assert len({facts[name] for name in facts if name.endswith("sha256")}) == 4


def test_numbers_of_other_types_are_saved_as_python_s(mnist, tmp_path):
    import numpy as np

    options = dataclasses.asdict(TrainConfig.of({"data": "digits"}))
    options |= {"epochs": np.int64(1), "lr": np.float32(0.5), "batch": np.int16(9), "limit": 20}
    config = TrainConfig.of(options)
    assert type(config.epochs) is int and type(config.lr) is float and type(config.batch) is int
    json.dumps(dataclasses.asdict(config))
    assert torch.tensor(config.lr) == 0.5
