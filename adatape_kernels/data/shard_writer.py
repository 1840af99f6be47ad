"""Writes the images of class folders as tar shards in the layout of WebDataset.

    python -m adatape_kernels.data.shard_writer FOLDER OUT

    OUT/classes.txt   OUT/train/000000.tar …   OUT/val/000000.tar …

Files are copied as they are, in the order of the folders, each with its label beside it.
"""

import argparse
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from adatape_kernels.arguments import check_int
from adatape_kernels.data.halves import TESTS, TRAIN
from adatape_kernels.data.image_folder import labelled_files
from adatape_kernels.data.printable import printable
from adatape_kernels.data.shards import CLASSES_FILE

IMAGES = 1000
"""Number of images of a shard."""


def write_shards(folder: Path, out: Path, *, images: int = IMAGES, seed: int = 0) -> None:
    """Write the shards of a folder of images.

    Args:
        folder: as in `data.image_folder`; it is only read.
        out: a new or empty folder.
        images: number of images of a shard.
        seed: decides which images are for the test, where the folder does not say it.

    Raises:
        ValueError: the folder is no set of images, or `out` is not empty, or a class has a name
            that cannot stand on a line.
        OSError: a file cannot be read or written.
    """
    check_int("images", images, 1)
    found = labelled_files(folder, seed)
    if any(not name.strip() or len(name.splitlines()) != 1 for name in found.class_names):
        raise ValueError("data-dir: expected names of classes that fill one line, got others")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, got {printable(out)}")
    for half, files, labels in (
        (TRAIN, found.train_files, found.train_labels.tolist()),
        (TESTS[0], found.test_files, found.test_labels.tolist()),
    ):
        (out / half).mkdir(parents=True, exist_ok=True)
        pairs = [*zip(files, labels, strict=True)]
        for shard, first in enumerate(range(0, len(pairs), images)):
            _write_shard(out / half / f"{shard:06d}.tar", first, pairs[first : first + images])
    names = "".join(f"{name}\n" for name in found.class_names)
    (out / CLASSES_FILE).write_text(names, encoding="utf-8")


def _write_shard(shard: Path, first: int, pairs: Sequence[tuple[Path, int]]) -> None:
    """Write a shard of files with labels, which are numbered from `first` on."""
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (file, label) in enumerate(pairs, start=first):
            image = tarfile.TarInfo(f"{number:08d}{file.suffix.lower()}")
            image.size = file.stat().st_size
            with file.open("rb") as stream:
                tar.addfile(image, stream)
            text = str(label).encode()
            member = tarfile.TarInfo(f"{number:08d}.cls")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shards; return 2 where that cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="a folder of classes, or one with train/ and val/ of them")
    add("out", type=Path, help="a new or empty folder for the shards")
    add("--images", type=int, default=IMAGES, metavar="N", help="of a shard; default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        write_shards(arguments.folder, arguments.out, images=arguments.images)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"shard_writer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
