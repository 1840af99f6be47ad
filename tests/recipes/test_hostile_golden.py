"""`verify` and `scenic.load_file` on files of any origin: a verdict, or one line that names it."""

import io
import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checks import refused
from limited_process import run_limited

from adatape_kernels import scenic
from adatape_kernels.cli import main
from adatape_kernels.data import npz_file
from adatape_kernels.data.npz_file import NpzFile, UnreadableFile
from adatape_kernels.models.encoder_config import MOST_VALUES
from adatape_kernels.recipes.verify import verify_file

# More are tried by ADATAPE_MUTATIONS=8000 pytest tests/recipes/test_hostile_golden.py.
MUTATIONS = int(os.environ.get("ADATAPE_MUTATIONS", "400"))
GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.npz"))
READ, MODEL = GOLDEN / "tape_read_learn_top1.npz", GOLDEN / "vit_input_token.npz"
LIMITS = pytest.mark.skipif(sys.platform != "linux", reason="the limit is read from /proc")


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array))
    return stream.getvalue()


def npy_header(shape, descr="<f4"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def write(path, entries, method=zipfile.ZIP_STORED):
    """Write arrays, or the bytes of an .npy file, by name; to compress them takes the most time."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, entry in entries.items():
            content = entry if isinstance(entry, bytes) else npy(entry)
            archive.writestr(f"{name}.npy", content)
    return path


def write_zeros(path, entries, name, megabytes):
    """Write arrays, and one more that is large and takes next to nothing."""
    write(path, {other: entry for other, entry in entries.items() if other != name})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{name}.npy", "w") as stream,
    ):
        stream.write(npy_header((megabytes << 18,)))
        for _ in range(megabytes):
            stream.write(bytes(1 << 20))
    return path


def with_config(file, *, halting=None, **entries):
    arrays = scenic.read_npz(file)
    config = json.loads(str(arrays["config"])) | entries
    if halting is not None:
        config["dynamic_tape_length"] |= halting
    return arrays | {"config": np.array(json.dumps(config))}


def one_line(path):
    """Return why `verify` refuses a file."""
    with pytest.raises(ValueError) as info:
        verify_file(path)
    return checked(info.value, path)


def checked(error, path):
    """Return what an error says of a file, which must be one short line that names it."""
    message = str(error)
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1, message
    assert message.isprintable() and len(message) < 800, message
    return message


COUNTS = {"n_read", "mask"}
RESULTS = {"tokens", "atr_loss", "logits", *COUNTS}


def is_result(name):
    return name in RESULTS or name.startswith("grad_")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.full((0, *a.shape), 7, a.dtype),
        lambda a: np.full((1,) * a.ndim, a.flat[0], a.dtype),
        lambda a: a[:0],
        lambda a: a[None],
        lambda a: a.astype(np.float64),
        lambda a: a.astype(">f4"),
        lambda a: a.astype(np.complex64),
    ],
)
def test_a_result_of_another_shape_or_type_is_refused(tmp_path, file, change):
    arrays = scenic.read_npz(file)
    for name in [*filter(is_result, arrays)][:12]:
        changed = write(tmp_path / "changed.npz", arrays | {name: change(arrays[name])})
        assert f"{name}: expected " in one_line(changed)


@pytest.mark.parametrize("file", [READ, MODEL], ids=lambda file: file.stem)
def test_a_file_without_results_is_refused(tmp_path, file):
    arrays = scenic.read_npz(file)
    one_line(write(tmp_path / "a.npz", {n: a for n, a in arrays.items() if not is_result(n)}))
    nothing = {n: a if n.startswith(("config", "params")) else a[:0] for n, a in arrays.items()}
    assert "not empty" in one_line(write(tmp_path / "a.npz", nothing))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_result_is_compared(tmp_path, file):
    """One element of any result that differs by more than the tolerance is noticed.

    All results are altered at once, and each comparison says that it has failed; then one alone.
    """
    arrays = scenic.read_npz(file)
    rng = np.random.default_rng(2)
    altered = {}
    for name in filter(is_result, arrays):
        altered[name] = changed = arrays[name].copy()
        place = rng.integers(changed.size)
        changed.flat[place] = changed.flat[place] + 1 + 9 * abs(changed.max())
    report = verify_file(write(tmp_path / "changed.npz", arrays | altered))
    assert not report.counts_agree and not report.passed
    compared = altered.keys() - COUNTS
    assert {c.name for c in report.comparisons if not c.passed} == compared
    one_of_each = [next(iter(names)) for names in (sorted(compared), altered.keys() & COUNTS)]
    for name in [*one_of_each, str(rng.choice(sorted(compared)))]:
        changed = arrays | {name: altered[name]}
        assert not verify_file(write(tmp_path / "changed.npz", changed)).passed


def test_the_gradient_of_a_key_bias_is_zero_in_the_file_too(tmp_path):
    arrays = scenic.read_npz(MODEL)
    name = next(n for n in arrays if n.startswith("grad") and n.endswith("key/bias"))
    changed = write(tmp_path / "changed.npz", arrays | {name: arrays[name] + np.float32(1e-4)})
    assert [c.name for c in verify_file(changed).comparisons if not c.passed] == [name]


def test_a_mask_whose_counts_agree_but_not_its_places_is_noticed(tmp_path):
    arrays = scenic.read_npz(MODEL)
    mask = arrays["mask"]
    for changed in (mask[:, ::-1].copy(), mask * 0 + 1, np.roll(mask, 1, axis=1)):
        assert not verify_file(write(tmp_path / "a.npz", arrays | {"mask": changed})).passed


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        (READ, {"split": 0}, "split: expected 1 to 32, got 0"),
        (READ, {"split": 1.5}, "split"),
        (READ, {"max_tape_tokens": 10**15}, "max_tape_tokens"),
        (READ, {"tokens_merged_per_step": 41}, "tokens_merged_per_step"),
        (READ, {"halt_threshold": "2"}, "halt_threshold"),
        (READ, {"halt_threshold": float("nan")}, "halt_threshold"),
        (READ, {"halt_threshold": 10**400}, "below 1e308"),
        (READ, {"average_query": None}, "average_query"),
        (READ, {"loss_type": [1]}, "loss_type"),
        (READ, {"bank_type": {}}, "bank_type"),
        (READ, {"bank_size": 41}, "bank_size"),
        (READ, {"features": 31}, "features"),
        (READ, {"kind": ["tape_read"]}, "'dynamic_tape_length'"),
        (MODEL, {"num_heads": 0}, "num_heads"),
        (MODEL, {"num_heads": 6}, "out/kernel"),
        (MODEL, {"num_layers": 65537}, "depth: expected 1 to 4096"),
        (MODEL, {"num_layers": 10**30}, "depth"),
        (MODEL, {"num_classes": 10**9}, "head.weight"),
        (MODEL, {"hidden_size": 48 << 10}, "output_projection"),
        (MODEL, {"halting": {"act_epsilon": 1e-320}}, "act_epsilon"),
        (MODEL, {"halting": {"act_epsilon": 0}}, "act_epsilon"),
        (MODEL, {"halting": {"act_epsilon": float("inf")}}, "act_epsilon"),
        (MODEL, {"halting": {"act_epsilon": 10**400}}, "below 1e308"),
        (MODEL, {"halting": {"act_epsilon": [2]}}, "act_epsilon"),
        (MODEL, {"halting": {"num_token_per_step": "x" * 10**5}}, "num_token_per_step"),
        (MODEL, {"add_tape_token_to_layers": []}, "config"),
        (MODEL, {"add_tape_token_to_layers": [[1]]}, "read_layers"),
        (MODEL, {"add_tape_token_to_layers": 1}, "types"),
        (MODEL, {"num_tape_tokens": 1 << 19, "halting": {"act_epsilon": 1 << 19}}, "16384"),
        (MODEL, {"classifier": []}, "types"),
        (MODEL, {"image": "\ud800\n\x1b[31m"}, "image_size"),
    ],
)
def test_a_configuration_out_of_range_is_one_line(tmp_path, file, entries, words):
    assert words in one_line(write(tmp_path / "a.npz", with_config(file, **entries)))


VERIFY = """
from adatape_kernels.cli import main
sys.stderr = sys.stdout
print("code", main(["verify", *sys.argv[1:]]))
"""


def hostile_files(folder):
    """Write files that ask for more than they hold, and return their paths."""
    read, model = scenic.read_npz(READ), scenic.read_npz(MODEL)
    big = 3000  # examples and bank entries, each row of one feature
    rows, bank = np.zeros((40 * big, 1), np.float32), np.zeros((big, 1), np.float32)
    scores = {name: rows[:, 0] for name in ("atr_loss", "cotangent_loss")}
    scores |= {
        name: np.zeros((40 * big, 6, 1), np.float32) for name in ("tokens", "cotangent_tokens")
    }
    scores |= {"query": rows, "grad_query": rows, "n_read": rows[:, 0].astype(np.int32)}
    for name, array in (
        ("tape_tokens", bank),
        ("bank_norm/scale", bank[0]),
        ("bank_norm/bias", bank[0]),
    ):
        scores |= {f"params/{name}": array, f"grad_params/{name}": array}
    scores["config"] = with_config(READ, split=1, features=1, bank_size=big)["config"]
    assert 40 * big * big > MOST_VALUES
    write(folder / "work.npz", scores, zipfile.ZIP_DEFLATED)
    write_zeros(folder / "used.npz", read, "tokens", 800)
    write_zeros(folder / "config.npz", read, "config", 800)
    write_zeros(folder / "params.npz", model, "params/cls", 800)
    for name, text in (("lists", "[" * 200_000), ("objects", '{"a":' * 100_000)):
        write(folder / f"{name}.npz", read | {"config": np.array(text)}, zipfile.ZIP_DEFLATED)
    write(folder / "bzip2.npz", read, zipfile.ZIP_BZIP2)
    write(folder / "lzma.npz", read, zipfile.ZIP_LZMA)
    for name, header in (
        ("shape", npy_header((10**15,))),
        ("negative", npy_header((-1,))),
        ("axes", npy_header((1,) * 40)),
        ("empty-axes", npy_header((0, 10**17, 10**17))),
        ("objects-inside", npy_header((1,), "|O")),
        ("fields", npy_header((1,), "<f4', 'x': '")),
        ("cut-header", npy(read["tokens"])[:50]),
        ("nothing", b""),
        ("long-header", b"\x93NUMPY\2\0\xff\xff\xff\x7f"),
    ):
        write(folder / f"{name}.npz", read | {"tokens": header}, zipfile.ZIP_DEFLATED)
    content = READ.read_bytes()
    end, entry = content.rfind(b"PK\5\6"), content.find(b"PK\1\2")
    for name, place, change in (
        ("directory", end + 12, b"\xff\xff\xff\x7f"),
        ("encrypted", entry + 8, b"\1"),
        ("compression", entry + 10, b"\x63"),
        ("size", entry + 24, b"\xff\xff\xff\x7f"),
        ("cut", len(content) // 2, None),
    ):
        after = content[place + len(change) :] if change else b""
        (folder / f"{name}.npz").write_bytes(content[:place] + (change or b"") + after)
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    with (folder / "vast.npz").open("wb") as stream:
        stream.truncate(1 << 40)
    return sorted(folder.iterdir())


@LIMITS
def test_each_hostile_file_is_one_line_and_the_others_are_checked(tmp_path):
    paths = hostile_files(tmp_path)
    unused = write_zeros(tmp_path / "unused.npz", scenic.read_npz(READ), "spare", 800)
    lines = run_limited(VERIFY, *paths, unused, READ, megabytes=600).splitlines()
    for path, line in zip(paths, lines, strict=False):
        assert line.startswith(f"{path}: "), (path, line)
        assert "expected " in line and "got" in line and len(line) < 400, line
    rest = lines[len(paths) :]
    assert [line.split(":")[0] for line in rest if "ok, counts agree" in line] == [
        str(unused),
        str(READ),
    ]
    assert rest[-1] == "code 2"


def test_a_name_that_no_terminal_shows_is_escaped(tmp_path, capsys):
    path = tmp_path / "line\nbreak\x1b[31m.npz"
    path.write_text("no archive")
    assert main(["verify", str(path), str(READ)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and r"line\nbreak\x1b[31m.npz: expected" in captured.err
    assert "ok, counts agree" in captured.out


def mutated(content, rng):
    """Change bytes of an archive, most often in its directory, or cut it."""
    changed = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 2, 8]))):
        marks = [b"PK\1\2", b"PK\3\4", b"PK\5\6"]
        kind = int(rng.integers(5))
        place = int(rng.integers(len(changed)))
        if kind < 3:
            place = changed.find(marks[kind], place) % len(changed) + int(rng.integers(46))
        size = int(rng.choice([1, 1, 2, 4]))
        values = [bytes(size), b"\xff" * size, rng.bytes(size)]
        changed[place : place + size] = values[int(rng.integers(3))]
        if kind == 4 and rng.integers(3) == 0:
            del changed[place:]
            break
    return bytes(changed)


def test_mutated_archives_pass_only_if_every_array_is_as_it_was(tmp_path):
    rng = np.random.default_rng(11)
    originals = [(file.read_bytes(), scenic.read_npz(file)) for file in FILES]
    path, passed = tmp_path / "mutated.npz", 0
    for turn in range(MUTATIONS):
        content, arrays = originals[turn % len(originals)]
        path.write_bytes(mutated(content, rng))
        try:
            if not verify_file(path).passed:
                continue
        except ValueError as error:
            checked(error, path)
            continue
        passed += 1
        found = scenic.read_npz(path)
        assert all(np.array_equal(found[n], a) for n, a in arrays.items() if n != "config")
    assert 0.02 * MUTATIONS < passed < 0.8 * MUTATIONS


def test_mutated_headers_and_configurations_are_refused_or_change_nothing(tmp_path):
    rng = np.random.default_rng(12)
    values = [0, 1, -1, 3, 2**31, 10**15, 0.5, 1e-320, float("nan"), None, True, "", [], {}, [[0]]]
    originals = [scenic.read_npz(file) for file in FILES]
    path = tmp_path / "mutated.npz"
    for turn in range(MUTATIONS):
        arrays = originals[turn % len(originals)]
        name = str(rng.choice([*arrays][: 1 + turn % len(arrays)]))
        if turn % 2:
            header = bytearray(npy(arrays[name]))
            header[int(rng.integers(128))] = int(rng.choice([*b"0123456789(),'<>|fiOTU: \0\xff"]))
            write(path, arrays | {name: bytes(header)}, zipfile.ZIP_STORED)
        else:
            config = json.loads(str(arrays["config"]))
            inner = config.get("dynamic_tape_length", config)
            part = config if rng.integers(3) else inner
            part[str(rng.choice([*part]))] = values[int(rng.integers(len(values)))]
            changed = arrays | {"config": np.array(json.dumps(config))}
            write(path, changed, zipfile.ZIP_STORED)
        try:
            passed = verify_file(path).passed
        except ValueError as error:
            checked(error, path)
            continue
        if passed:
            found = scenic.read_npz(path)
            assert all(np.array_equal(found[n], a) for n, a in arrays.items() if n != "config")


def test_load_file_names_the_file_once(tmp_path):
    path = write(tmp_path / "a.npz", with_config(MODEL, num_heads=0))
    with refused(f"{path}: num_heads"):
        scenic.load_file(path)
    path = write(
        tmp_path / "a.npz", scenic.read_npz(MODEL) | {"params/cls": np.zeros((1, 1, 48), "i4")}
    )
    with refused(f"{path}: params", "floating point"):
        scenic.load_file(path)
    with pytest.raises(UnreadableFile, match=r"absent\.npz: expected .*no such file$"):
        scenic.load_file(tmp_path / "absent.npz")


def test_what_is_read_of_a_file_together_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "FREE_BYTES", 4000)
    monkeypatch.setattr(npz_file, "MOST_INFLATION", 0)
    half = np.zeros(500, np.float32)
    path = write(tmp_path / "a.npz", {"a": half, "b": half, "c": half})
    with NpzFile(path) as arrays:
        for _ in range(3):  # to read an array again takes nothing more
            assert np.array_equal(arrays["a"], half)
        arrays["b"]
        with pytest.raises(UnreadableFile, match="more than"):
            arrays["c"]
        assert arrays.header("c").shape == (500,)


def test_arrays_of_every_readable_type_and_order(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(4, dtype=">f4"),
        "truth": np.array([True, False]),
        "text": np.array("a text"),
        "number": np.array(3),
        "empty": np.zeros((0, 3), np.int8),
        "complex": np.array([1j]),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = scenic.read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
