"""A few drawn images in ImageNet's layout, to try what ImageNet itself is to be run through.

    python -m adatape_kernels.data.imagenet_miniature FOLDER

    FOLDER/train/n01440764/n01440764_0.JPEG …
    FOLDER/val/n01440764/ILSVRC2012_val_00000001.JPEG …

Names, folders and kinds of images are ImageNet's: JPEG files of several sizes, one of them grey,
one in CMYK as for a printer, and one that its EXIF asks to be turned.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adatape_kernels.arguments import check_int
from adatape_kernels.data.image_file import pillow

SYNSETS = ("n01440764", "n02123045", "n03594945", "n07753592")
"""The classes by the names that ImageNet gives their folders: a fish, a cat, a car, a fruit."""
SIDES = ((120, 90), (90, 120), (64, 64), (200, 133), (75, 113))
"""Widths and heights that images take in turn."""
_ORIENTATION, _TURNED = 0x0112, 6


def write_miniature(folder: Path, *, train: int = 6, val: int = 2, seed: int = 0) -> None:
    """Write a miniature of ImageNet.

    Args:
        folder: a folder, which is made; files of the same names are overwritten.
        train: number of training images of each class, 3 or more, of which one of the first class
            is grey, one in CMYK, and one to be turned.
        val: number of test images of each class, 1 or more.
        seed: decides the pictures.

    Raises:
        ValueError: a number is out of range.
        RuntimeError: Pillow is not installed.
    """
    check_int("train", train, 3)
    check_int("val", val, 1)
    draws = np.random.default_rng(seed)
    number = 0
    for label, synset in enumerate(SYNSETS):
        for half, count in (("train", train), ("val", val)):
            (folder / half / synset).mkdir(parents=True, exist_ok=True)
            for place in range(count):
                number += 1
                name = f"{synset}_{place}" if half == "train" else f"ILSVRC2012_val_{number:08d}"
                kind = place if half == "train" and label == 0 else len(SIDES)
                file = folder / half / synset / f"{name}.JPEG"
                _write(file, label, SIDES[number % len(SIDES)], kind, draws)


def _write(
    file: Path, label: int, side: tuple[int, int], kind: int, draws: np.random.Generator
) -> None:
    """Write an image, grey if its kind is 0, in CMYK if it is 1, and lying on its side if it is 2.

    A class is told by the direction and the colour of stripes under noise.
    """
    image_module, _ = pillow()
    width, height = side
    y, x = np.mgrid[:height, :width]
    wave = np.sin((x * (label + 1) + y * (len(SYNSETS) - label)) / 9 + draws.uniform(0, 6))
    colours = np.roll((200, 120, 60), label) * (1 + 0.4 * wave[..., None])
    pixels = (colours + draws.normal(0, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)
    image = image_module.fromarray(pixels)
    exif = image_module.Exif()
    if kind == 2:
        image = image.transpose(image_module.Transpose.ROTATE_90)
        exif[_ORIENTATION] = _TURNED
    image = {0: image.convert("L"), 1: image.convert("CMYK")}.get(kind, image)
    image.save(file, "JPEG", quality=90, exif=exif)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the miniature."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where train/ and val/ are written")
    write_miniature(parser.parse_args(argv).folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
