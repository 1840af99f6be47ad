"""Which entries of a folder are classes and images, and a line about all that are not."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from adatape_kernels.data.halves import TESTS, TRAIN
from adatape_kernels.data.image_file import SUFFIXES
from adatape_kernels.data.printable import printable

RUN_FILES = ("checkpoint.json", "model.safetensors")
"""Files of which a training run or the demo leaves at least one in its folder."""

# What systems put beside the files of their users.
_SYSTEM_NAMES = {
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",
    "#recycle",
    "#snapshot",
}
_CHECKPOINT = re.compile(
    r"checkpoint-\d+(-[0-9a-f]{8})?\.safetensors(\..*)?|checkpoint\.json\..*|adatape-kernels\.lock"
)
_SHOWN_CHARACTERS = 40
_BESIDE = "beside the class folders"
# How many folders below a folder of runs a run is looked for, as in runs/photos/first.
_DEPTH_OF_RUNS = 4


class SkippedEntries:
    """Entries of folders that are neither classes nor images, by the reason why."""

    def __init__(self) -> None:
        self.paths: dict[str, list[Path]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Note an entry."""
        self.paths.setdefault(reason, []).append(path)

    def add_all(self, others: "SkippedEntries") -> None:
        """Note the entries of another one."""
        for reason, paths in others.paths.items():
            self.paths.setdefault(reason, []).extend(paths)

    def line(self, folder: Path) -> str | None:
        """Return one line that says what was skipped below a folder, or None for nothing."""
        parts = []
        for reason, paths in self.paths.items():
            shown = printable(os.path.relpath(paths[0], folder), _SHOWN_CHARACTERS)
            more = ", …" if len(paths) > 1 else ""
            parts.append(f"{len(paths)} {reason} ({shown}{more})")
        return f"skipped in {printable(folder)}: {', '.join(parts)}" if parts else None


def class_files(folder: Path, skipped: SkippedEntries) -> dict[str, list[Path]]:
    """Return the image files of each class by its name, classes and files in alphabetical order.

    Nothing is opened but folders. Names that are hidden or belong to a system, folders that a run
    has written, folders inside of a class, broken links, and whatever is neither file nor folder
    are skipped, as are files of other types and files beside the class folders.

    Args:
        folder: holds a folder for each class.
        skipped: takes what is skipped.

    Raises:
        ValueError: there are fewer than two classes, a class has no image, or a file cannot be
            read.
    """
    classes = {}
    for inner, mode in _visible(folder, skipped):
        if not stat.S_ISDIR(mode):
            skipped.add(_BESIDE, inner)
        elif inner.is_symlink() and inner.resolve() in (
            folder.resolve(),
            *folder.resolve().parents,
        ):
            skipped.add("link to a folder around it", inner)
        elif _is_run(inner):
            skipped.add("folder of a run", inner)
        else:
            inside = SkippedEntries()
            files = _images(inner, inside)
            if files:
                classes[inner.name] = files
                skipped.add_all(inside)
            elif _holds_runs(inner):
                skipped.add("folder of runs", inner)
            else:
                raise ValueError(
                    f"data-dir: expected JPEG or PNG files in {printable(inner)}, got none"
                )
    flat = [path for path in skipped.paths.get(_BESIDE, ()) if path.parent == folder]
    images = [path for path in flat if path.suffix.lower() in SUFFIXES]
    if images and not classes:
        raise ValueError(
            f"data-dir: expected a folder for each class in {printable(folder)}, got "
            f"{len(images):,} images without one ({printable(images[0].name, _SHOWN_CHARACTERS)}"
            f"{', …' if len(images) > 1 else ''}); move each to "
            f"{printable(folder.name)}/CLASS/, with the names of the classes"
            f"{f' in {TRAIN}/' if folder.name in TESTS else ''}"
        )
    if len(classes) < 2:
        line = skipped.line(folder)
        raise ValueError(
            "data-dir: expected a folder for each of two or more classes in "
            f"{printable(folder)}, got {len(classes)}{f' ({line})' if line else ''}"
        )
    return classes


def _images(folder: Path, skipped: SkippedEntries) -> list[Path]:
    """Return the image files of a class in alphabetical order."""
    files = []
    for inner, mode in _visible(folder, skipped):
        if stat.S_ISDIR(mode):
            skipped.add("folder inside of a class", inner)
        elif not stat.S_ISREG(mode):
            skipped.add("neither file nor folder", inner)
        elif inner.suffix.lower() not in SUFFIXES:
            skipped.add("of other types", inner)
        elif not os.access(inner, os.R_OK):
            raise ValueError(f"{printable(inner)}: expected a file that can be read, got a locked")
        else:
            files.append(inner)
    return files


def _visible(folder: Path, skipped: SkippedEntries) -> Iterator[tuple[Path, int]]:
    """Yield the entries of a folder that are not hidden, and what they are, links followed."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(
            f"data-dir: expected a folder that can be read at {printable(folder)}, "
            f"got {error.strerror}"
        ) from None
    for inner in entries:
        if inner.name.startswith(".") or inner.name.lower() in _SYSTEM_NAMES:
            skipped.add("hidden or of the system", inner)
            continue
        try:
            mode = inner.stat().st_mode
        except OSError as error:
            if not inner.is_symlink():
                raise ValueError(
                    f"{printable(inner)}: expected a file that can be read, got {error.strerror}"
                ) from None
            skipped.add("broken link", inner)
            continue
        yield inner, mode


def _is_run(folder: Path) -> bool:
    """Return whether a training run, the demo or the benchmarks have written into a folder."""
    try:
        names = {inner.name for inner in folder.iterdir()}
    except OSError:
        return False
    if names.intersection(RUN_FILES) or any(_CHECKPOINT.fullmatch(name) for name in names):
        return True
    # The benchmarks write tables, and beside a page NAME.md of a table NAME.csv also pictures.
    tables = [Path(name) for name in names if name.endswith(".csv")]
    images = any(Path(name).suffix.lower() in SUFFIXES for name in names)
    return any(not images or str(table.with_suffix(".md")) in names for table in tables)


def _holds_runs(folder: Path, depth: int = _DEPTH_OF_RUNS) -> bool:
    """Return whether a folder without images holds folders of runs, up to `depth` folders down."""
    try:
        inner = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return False
    return any(_is_run(entry) or (depth > 1 and _holds_runs(entry, depth - 1)) for entry in inner)
