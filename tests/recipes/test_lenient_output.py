"""Terminals that are none, and texts that a terminal or a picture cannot show."""

import contextlib
import errno
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading

import pytest
from forked_python import CLOSED, run
from image_files import write_folder

from adatape_kernels.cli import main
from adatape_kernels.recipes import terminal
from adatape_kernels.recipes.training import train as recipe

TINY = ["--patch", "14", "--bank-patch", "7", "--dim", "16", "--depth", "1", "--heads", "2"]
TINY += ["--ffn", "16", "--num-tape-tokens", "2", "--topk", "2", "--image-size", "14"]
NAMES = [
    "Ba$$in",
    "$\\frac{1}{$",
    "a_b^c\\d{x}%#&~",
    "two\nlines",
    "שלום",
    "a\u202eb",
    "emoji😀",
    "long" * 50,
    os.fsdecode(b"not-utf8-\xff\xfe"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, classes=("kätzchen", "Ba$$in"))
    return folder


# The command, which draws one of its pictures: these take more time than all else.
COMMAND = """
import runpy
from adatape_kernels.recipes import pictures
class Undrawn:
    def savefig(self, *given, **options):
        pass

for name in ("cost_shares", "tape_lengths", "shortest_longest"):
    setattr(pictures, name, lambda *given: Undrawn())
runpy.run_module("adatape_kernels.cli", run_name="__main__")
"""


def words_of(photos, out, command=COMMAND):
    words = ["-c", command, "train", "--data", "imagefolder"]
    return [*words, "--data-dir", str(photos), "--out", str(out), "--epochs", "1", *TINY]


def shell(words, redirect, **environment):
    """Run Python in a shell, where streams can be closed; return what came of it."""
    line = shlex.join([sys.executable, *words]) + redirect
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, timeout=600)


def check_run(out):
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["class_names"] == ["Ba$$in", "kätzchen"]
    # A descriptor that was closed has not been given to a file, for libraries to write into.
    assert (out / "checkpoint.json").read_text().startswith('{\n "format"')
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")


# Before the command is run its data are sought where there are none.
FAILS_BEFORE = """
import sys
from adatape_kernels.cli import main
words = sys.argv[1:]
words[words.index("--data-dir") + 1] += "/nowhere"
if main(words) != 2:
    sys.exit(5)
"""


def test_a_run_that_starts_without_streams(photos, tmp_path):
    """A failed one says so by its exit code."""
    out = tmp_path / "run"
    result = shell(words_of(photos, out, FAILS_BEFORE + COMMAND), " <&- >&- 2>&-")
    assert result.returncode == 0
    check_run(out)


@contextlib.contextmanager
def full_disks(words):
    with open("/dev/full", "w") as full:
        yield full, full


@contextlib.contextmanager
def nobody_reads(words):
    reader, writer = os.pipe()
    os.close(reader)
    yield writer, writer
    os.close(writer)


@contextlib.contextmanager
def the_reader_goes_away(words):
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (os.read(reader, 1), os.close(reader)))
    thread.start()
    yield writer, words
    os.close(writer)
    thread.join()


@pytest.mark.parametrize(
    "streams",
    [
        lambda words: contextlib.nullcontext((CLOSED, words)),
        lambda words: contextlib.nullcontext((words, CLOSED)),
        full_disks,
        nobody_reads,
        the_reader_goes_away,
    ],
    ids=["no stdout", "no stderr", "full disks", "nobody reads", "the reader goes away"],
)
def test_a_run_outlives_its_terminal(photos, tmp_path, streams):
    """`streams` gives stdout and stderr; what is said may go into the file that it is given."""
    out = tmp_path / "run"
    with tempfile.TemporaryFile() as words:
        with streams(words) as (stdout, stderr):
            done = run(words_of(photos, out), stdout=stdout, stderr=stderr, timeout=600)
        words.seek(0)
        said = words.read()
    assert done.returncode == 0, said
    assert b"Traceback" not in said and b"Exception" not in said
    check_run(out)


def test_ascii_shows_other_characters_as_escapes(photos, tmp_path):
    words = words_of(photos, tmp_path / "läufe")
    result = shell(words, "", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert result.returncode == 0, result.stderr
    assert b"l\\xe4ufe" in result.stdout.splitlines()[-2]  # above the best epoch


def test_a_failed_run_says_so_by_its_exit_code_where_nothing_can_be_said(photos, tmp_path):
    words = words_of(photos / "nowhere", tmp_path / "run")
    with open("/dev/full", "w") as full:
        for streams in ({"stderr": full}, {"stdout": CLOSED, "stderr": CLOSED}):
            done = run(words, **streams, capture_output=True, timeout=600)
            assert done.returncode == 2 and done.stdout == b""


def test_class_names_that_are_hard_to_draw_do_not_end_a_run(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", classes=NAMES, count=3)
    monkeypatch.setattr(recipe, "ROUNDS", 1)
    run = ["train", "--data", "imagefolder", "--data-dir", str(tmp_path / "data"), *TINY]
    out = tmp_path / "run"
    assert main([*run, "--epochs", "1", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["data"]["class_names"] == sorted(NAMES)
    assert main(["train", "--resume", "--out", str(out)]) == 0
    for name in ("heatmap", "tape_lengths", "shortest_longest", "costs"):
        assert (out / f"{name}.png").stat().st_size > 5000


class Failing(io.StringIO):
    """A stream that answers every call with one error."""

    encoding = "ascii"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: self.write("")


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "no reader"),
        BlockingIOError(errno.EAGAIN, "a full pipe"),
        OSError(errno.ENOSPC, "a full disk"),
        OSError(errno.EIO, "no terminal"),
        ValueError("I/O operation on closed file"),
    ],
)
def test_no_error_of_a_stream_gets_through(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    monkeypatch.setattr(sys, "stderr", None)
    with terminal.lenient_output():
        print("words", flush=True)
        print("words", file=sys.stderr)
        assert not sys.stderr.isatty()
    terminal.say("words")
    assert isinstance(sys.stdout, Failing) and sys.stderr is None


@pytest.fixture
def full_pipe():
    """The writing end of a pipe that nobody reads and that takes no more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


def test_a_run_does_not_wait_for_the_reader_of_a_full_pipe(photos, tmp_path, full_pipe):
    words = words_of(photos, tmp_path / "run")
    assert run(words, stdout=full_pipe, stderr=full_pipe, timeout=600).returncode == 0
    assert (tmp_path / "run" / "report.json").exists()


def test_what_can_be_written_is(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal.lenient_output():
        print("läufe \udcff $x$")
        sys.stdout.write("rest")
        with terminal.lenient_output():
            print()
    assert stream.buffer.getvalue() == b"l\\xe4ufe \\udcff $x$\nrest\n"


# Matplotlib looks at its settings when it is imported, which is after the fork. What takes time is
# done once, and the images are few.
DEMO = """
import os, sys, torch
from adatape_kernels.cli import main
from adatape_kernels.recipes import demo

assert "matplotlib" not in sys.modules
demo.ROUNDS, whole = 1, demo.digits
def few(seed):
    data = whole(seed)
    halves = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return type(data)(*(half[:100] for half in halves), data.class_names)
demo.digits = few

def forked(out, **variables):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os.environ.update(variables)
        os._exit(main(["demo", "--epochs", "1", "--out", out]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

codes = [forked(sys.argv[1])]
print("the second", file=sys.stderr, flush=True)
codes.append(forked(sys.argv[2], MPLBACKEND="no such backend"))
print(codes)
"""


def test_the_demo_draws_under_settings_of_the_user(tmp_path):
    """Under TeX, `$` and `_` in a text would be commands, and without TeX nothing could be drawn.

    Settings that cannot be read are named before any training.
    """
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\n")
    done = subprocess.run(
        [sys.executable, "-c", DEMO, str(tmp_path / "demo"), str(tmp_path / "other")],
        env={**os.environ, "MPLCONFIGDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.stdout.endswith(b"[0, 2]\n"), done.stderr
    refusal = done.stderr.partition(b"the second\n")[2]
    assert b"matplotlib" in refusal and refusal.count(b"\n") == 1
    assert (tmp_path / "demo" / "costs.png").stat().st_size > 5000
    assert not (tmp_path / "other").exists()
