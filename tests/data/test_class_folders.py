"""What lies in a folder of classes and is none, and what is no image in a class."""

import os

import pytest
from checks import refused
from image_files import write_folder

from adatape_kernels.data import load
from adatape_kernels.data.class_folders import RUN_FILES
from adatape_kernels.data.printable import printable

pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def loaded(folder):
    return load("imagefolder", folder, image_size=8)


def test_folders_of_runs_are_no_classes(tmp_path):
    write_folder(tmp_path)
    names = [*RUN_FILES, "checkpoint-0.safetensors", "checkpoint.json.part", "amd.csv"]
    for number, name in enumerate(names):
        run = tmp_path / f"run{number}"
        run.mkdir()
        (run / name).touch()
        if name in RUN_FILES:
            (run / "heatmap.png").touch()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "checkpoint.json").touch()
    (tmp_path / "old" / "photos" / "second").mkdir(parents=True)
    (tmp_path / "old" / "photos" / "second" / "checkpoint.json").touch()
    (tmp_path / "bench").mkdir()
    for name in ("amd.csv", "amd.md", "amd-rows.png"):
        (tmp_path / "bench" / name).touch()
    data = loaded(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.notes[:1] == (
        f"skipped in {tmp_path}: 6 folder of a run (bench, …), 2 folder of runs (old, …)",
    )


def test_what_is_skipped_is_said_in_one_line(tmp_path):
    write_folder(tmp_path)
    cat = tmp_path / "cat"
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt", "film.gif"):
        (cat / name).write_bytes(b"no image")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "$RECYCLE.BIN").mkdir()
    (tmp_path / "readme.txt").touch()
    (cat / "x.png").mkdir()
    os.mkfifo(cat / "pipe.png")
    (cat / "loop.png").symlink_to("loop.png")
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "around").symlink_to(tmp_path)
    (tmp_path / "higher").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    data = loaded(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert len(data.train_images) + len(data.test_images) == 10
    line, _ = data.notes
    assert "\n" not in line
    for words in (
        "5 hidden or of the system ($RECYCLE.BIN, …)",
        "2 link to a folder around it (around, …)",
        "2 of other types (cat/film.gif, …)",
        "1 neither file nor folder (cat/pipe.png)",
        "1 folder inside of a class (cat/x.png)",
        "1 beside the class folders (readme.txt)",
        "3 broken link (cat/gone.png, …)",
    ):
        assert words in line, line


def test_a_tidy_folder_needs_no_line(tmp_path):
    for half in ("train", "val"):
        write_folder(tmp_path / half, suffixes=(".png", ".JPG", ".bmp", ".webp", ".jpeg"))
    data = loaded(tmp_path)
    assert data.notes == ()
    data.look()


def test_a_class_of_hidden_files_only_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "._0.png").touch()
    with refused("data-dir", str(tmp_path / "emu"), "got none"):
        loaded(tmp_path)


def test_a_file_that_may_not_be_read_shows_before_training(tmp_path, monkeypatch):
    write_folder(tmp_path)
    original = os.access
    # The tests may run as root, who may read everything.
    monkeypatch.setattr(
        os, "access", lambda path, mode: path.name != "3.jpg" and original(path, mode)
    )
    with refused(tmp_path / "cat" / "3.jpg", "can be read"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("cat", None, "cat"),
        ("Ba$$in a_b^c\\d", None, "Ba$$in a_b^c\\d"),
        ("two\nlines\t\x1b[31m", None, "two\\nlines\\t\\x1b[31m"),
        ("läufe שלום 猫 😀", None, "läufe שלום 猫 😀"),
        ("a\u202eb", None, "a\\u202eb"),
        (os.fsdecode(b"n\xff\xfe"), None, "n\\xff\\xfe"),
        ("\ud800", None, "\\ud800"),
        ("0123456789", 10, "0123456789"),
        ("0123456789x", 10, "01234…789x"),
        ("", 5, ""),
    ],
)
def test_printable(text, most, expected):
    assert printable(text, most) == expected
