"""Where the training half and the test half of an image set lie in its folder."""

from pathlib import Path

from adatape_kernels.data.printable import printable

TRAIN, TESTS = "train", ("val", "test")
TEST_SHARE = 0.2
"""Share of the images that are for the test, where a folder has no half of its own for it."""


def halves_of(folder: Path) -> tuple[Path, Path | None]:
    """Return where the training images and the test images lie.

    Returns:
        The folder's train/, or the folder itself where there is none; and the first of val/ and
        test/ beside train/, or None where a part of the training images has to be the test.
    """
    train = folder / TRAIN
    if not train.is_dir():
        return folder, None
    return train, next((folder / name for name in TESTS if (folder / name).is_dir()), None)


def split_note(folder: Path, held: int, total: int, seed: int) -> str:
    """Return the line that says which images are the test of a set that has no such half.

    Args:
        folder: that of the set.
        held: number of images that are the test.
        total: number of all images.
        seed: what they were drawn by.
    """
    missing = "val or test beside train" if (folder / TRAIN).is_dir() else "train folder"
    return (
        f"{held:,} of {total:,} images, drawn by the seed {seed}, are the test, since "
        f"{printable(folder)} has no {missing}"
    )
