"""CIFAR-10's python batches of any origin: what they hold, or one line, in little memory."""

import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import refused
from image_files import cifar_arrays, cifar_pickle
from limited_process import run_limited

from adatape_kernels.data.cifar10 import read_binary, read_python
from adatape_kernels.data.pickled_batch import MOST_INSTRUCTIONS, parse_batch

# More are tried by ADATAPE_MUTATIONS=80000 pytest tests/data/test_hostile_batches.py.
MUTATIONS = int(os.environ.get("ADATAPE_MUTATIONS", "3000"))
LIMITS = pytest.mark.skipif(sys.platform != "linux", reason="the limit is read from /proc")


def resaved(protocol, text=bytes, count=4):
    """A batch as a program of Python 3 saves it again."""
    images, labels = cifar_arrays(count, seed=1)
    name = (lambda n: n) if text is str else str.encode
    batch = {
        name("batch_label"): name("training batch 1 of 5"),
        name("labels"): labels.tolist(),
        name("data"): images,
        name("filenames"): [name(f"image-{i}.png") for i in range(count)],
    }
    return pickle.dumps(batch, protocol)


def of_python_2_as_text(count=4):
    """A batch in protocol 0, as Python 2 writes it."""
    images, labels = cifar_arrays(count, seed=1)
    quoted = repr(images.tobytes())[1:].encode()
    text = b"(dp1\nS'labels'\np2\n(lp3\n" + b"".join(b"I%d\na" % label for label in labels)
    text += b"sS'data'\np4\ncnumpy.core.multiarray\n_reconstruct\np5\n"
    text += b"(cnumpy\nndarray\np6\n(I0\ntp7\nS'b'\np8\ntp9\nRp10\n"
    text += b"(I1\n(L%dL\nI3072\ntp11\ncnumpy\ndtype\np12\n" % count
    text += b"(S'u1'\np13\nI0\nI1\ntp14\nRp15\n(I3\nS'|'\np16\nNNNI-1\nI-1\nI0\ntp17\nb"
    return text + b"I00\nS" + quoted + b"\np18\ntp19\nbs."


ORIGINALS = {
    "python-2": lambda: cifar_pickle(*(lambda a, b: (a, b.tolist()))(*cifar_arrays(4, seed=1))),
    "python-2-text": of_python_2_as_text,
    **{f"bytes-{p}": lambda p=p: resaved(p) for p in range(6)},
    **{f"str-{p}": lambda p=p: resaved(p, str) for p in range(6)},
}


@pytest.mark.parametrize("origin", ORIGINALS)
def test_a_batch_of_any_protocol_gives_back_what_was_saved(tmp_path, origin):
    path = tmp_path / "batch"
    path.write_bytes(ORIGINALS[origin]())
    images, labels = read_python(path)
    expected_images, expected_labels = cifar_arrays(4, seed=1)
    assert np.array_equal(images.flatten(1).numpy(), expected_images)
    assert np.array_equal(labels.numpy(), expected_labels)


def test_a_batch_of_published_size_stays_far_below_the_limit():
    content = pickle.dumps({b"filenames": [b"image-%d" % i for i in range(60_000)]}, 2)
    assert len(parse_batch(content)["filenames"]) == 60_000


NESTED = 400_000
TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\0"
HOSTILE = {
    "nested-key": b"}" + b")" + b"\x85" * NESTED + b"K\1s.",
    "nested-value": b"}U\4data)" + b"\x85" * NESTED + b"s.",
    "nested-lists": b"]" * NESTED + b"a" * (NESTED - 1) + b".",
    "nested-dicts": b"}U\1a" * NESTED + b"N" + b"s" * NESTED + b".",
    "nested-marks": b"(" * NESTED + b"t" * NESTED + b".",
    "list-in-itself": b"]q\0h\0a.",
    "memo": b"\x80\2}r\0\0\0\x40.",
    "memo-line": b"}p1073741824\n.",
    "memo-negative": b"}p-1\n.",
    "unset-memo": b"h\7.",
    "long-bytes": b"B\xff\xff\xff\x7f" + b"a" * 9 + b".",
    "longest-bytes": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 40) + b".",
    "frame": b"\x80\4\x95" + b"\xff" * 8 + b"}.",
    "long-integer": b"\x8a\xff" + b"\x7f" * 255 + b".",
    "longest-integer": b"\x8b\xff\xff\xff\x7f.",
    "decimal": b"I" + b"9" * 500_000 + b"\n.",
    "endless-text": b"S'" + b"a" * 500_000,
    "escape": b"S'\\q'\n.",
    "octal-escape": b"S'\\777'\n.",
    "long-name": b"c" + b"a" * 500_000 + b"\nb\n.",
    "line-break-in-name": b"\x8c\3a\nb\x8c\3\x1b[m\x93.",
    "name-of-bytes": b"C\1aC\1b\x93.",
    "surrogate": b"X\3\0\0\0\xed\xa0\x80X\1\0\0\0a\x93.",
    "copies-of-a-text": TEXT
    + b"X\6\0\0\0latin1q\1](c_codecs\nencode\nq\2"
    + b"h\2h\0h\1\x86R" * 5000
    + b"e.",
    "tuples-of-a-long-tuple": b"(" + b"K\1" * 100_000 + b"tq\0(" + b"h\0\x85" * 100_000 + b"l.",
    "instructions": b"N" * (MOST_INSTRUCTIONS + 1),
    "call-of-a-list": b"])R.",
    "call-without-arguments": b"cnumpy\ndtype\n)R.",
    "state-of-a-list": b"])b.",
    "state-of-nothing": b")b.",
    "extension": b"\x82\1.",
    "persistent": b"Pid\n.",
    "duplicate": b"]2.",
    "nothing": b".",
    "a-number": b"K\1.",
    "pixels-that-are-missing": b"}(U\6labels](K\1eU\4datacnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\nK\0\x85U\1b\x87RU\1xNu.",
}

READ_ALL = """
import pathlib
from adatape_kernels.data.cifar10 import read_python
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        read_python(path)
        print("read")
    except ValueError as error:
        print(error)
"""


@LIMITS
def test_a_hostile_batch_is_one_line(tmp_path):
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "vast").open("wb") as stream:
        stream.truncate(1 << 40)
    lines = run_limited(READ_ALL, tmp_path).splitlines()
    names = sorted([*HOSTILE, "vast"])
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{tmp_path / name}: expected "), (name, line)
        assert ", got " in line and len(line) < 400 and line.isprintable(), (name, line)


MUTATE = """
import pathlib, time
import numpy as np
sys.path.insert(0, sys.argv[3])
from test_hostile_batches import ORIGINALS, mutated
from adatape_kernels.data.cifar10 import read_python
path, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rng, originals = np.random.default_rng(5), [make() for make in ORIGINALS.values()]
read = slowest = 0
for turn in range(number):
    path.write_bytes(mutated(originals[turn % len(originals)], rng))
    start = time.perf_counter()
    try:
        images, labels = read_python(path)
        assert images.shape == (len(labels), 3, 32, 32) and 0 <= int(labels.min())
        assert int(labels.max()) < 10
        read += 1
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path}: expected ") and ", got " in message, message
        assert message.isprintable() and len(message) < 500, message
    slowest = max(slowest, time.perf_counter() - start)
print(read, slowest)
"""


def mutated(content, rng):
    """Change bytes outside of the pixels, or the file's length."""
    pixels = cifar_arrays(4, seed=1)[0].tobytes()
    start = max(0, content.find(pixels[:40]))
    places = [p for p in range(len(content)) if not start <= p < start + len(pixels)]
    # The pixels of a protocol with escapes are longer; most of the rest lies before or after.
    places = places[:600] + places[-600:]
    changed = bytearray(content)
    kind = rng.integers(5)
    place = int(rng.choice(places))
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        changed[place : place + 4] = rng.choice([b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 4])
    elif kind == 2:
        other = int(rng.choice(places))
        changed[place:place] = changed[other : other + int(rng.integers(1, 30))]
    else:
        for _ in range(int(rng.integers(1, 5))):
            changed[int(rng.choice(places))] = int(rng.integers(256))
    return bytes(changed)


@LIMITS
def test_mutated_batches_are_read_or_one_line(tmp_path):
    here = Path(__file__).parent
    output = run_limited(MUTATE, tmp_path / "batch", MUTATIONS, here, seconds=60 + MUTATIONS / 20)
    read, slowest = output.split()
    assert 0.02 * MUTATIONS < int(read) < 0.7 * MUTATIONS
    assert float(slowest) < 5


def test_a_vast_binary_batch_is_one_line(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    with path.open("wb") as stream:
        stream.truncate(3073 << 30)
    with refused(path, "at most"):
        read_binary(path)
