"""One image file as pixels: which formats, which modes, and what a damaged one says."""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.data.printable import printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
"""How the names of image files end, in capitals or not."""
GROUND = (255, 255, 255)
"""The colour, white, that transparent pixels are laid over."""

MOST_PIXELS = 1 << 26
"""Most pixels that are decoded of an image: 8,192 by 8,192, which take about 1 GiB meanwhile.

A JPEG is decoded at up to an eighth of its sides, as far as the wanted size allows, and may have 64
times as many; Pillow's own limit, of 179 million unless it was changed, holds for those.
"""
MOST_FILE_BYTES = 1 << 29
"""Most bytes that an image file may have; some decoders read it as a whole."""

# A read of so many bytes is not worth asking how long the file is.
_BLOCK = 1 << 16
# So many bytes tell that a file is WebP.
_HEAD = 12

# Python's filters of warnings belong to the process, whose threads change them one at a time.
_filters = threading.Lock()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_ORIENTATION = 0x0112
# PNG states the transparent grey in the depth of the file; Pillow spreads the pixels to 0 to 255.
_SPREAD = {"L;2": 85, "L;4": 17}


def decode(file: Path, size: int) -> Tensor:
    """Return an image file as (3, size, size) uint8: upright, scaled, and cut to its middle.

    As `decode_to` does for a square.
    """
    return decode_to(file, lambda height, width: (size, size))


def decode_to(file: Path, sides: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Return an image file as (3, height, width) uint8: upright, scaled, and cut to its middle.

    The turn that EXIF asks for is done where the whole EXIF block can be read; a picture with a
    broken one is taken as it is. `to_rgb` says what becomes of transparency and of other modes.

    Args:
        file: the image file.
        sides: returns the height and the width that are wanted of a picture with the height and
            width that it is given. Turned by a quarter, a picture must be wanted turned, too.

    Raises:
        ValueError: this is no regular file, or the image is damaged, too large, or of another
            format than JPEG, PNG, WebP and BMP; the error names the file in one line.
        RuntimeError: Pillow is not installed.
    """
    with _opened_by_name(file) as image:
        return _upright_and_cut(image, sides)


def decode_content(content: bytes, name: str, size: int) -> Tensor:
    """Return the content of an image file as `decode` returns the file.

    Args:
        content: the bytes of the file.
        name: what errors call it.
        size: side in pixels of the square that the image is brought to.

    Raises:
        ValueError, RuntimeError: as in `decode_to`.
    """
    with _one_line(name, lambda: content[:_HEAD]), _opened(io.BytesIO(content)) as image:
        return _upright_and_cut(image, lambda height, width: (size, size))


def _upright_and_cut(image: Any, sides: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Decode an image that is open, as `decode_to` says."""
    image_module, image_ops = pillow()
    height, width = sides(image.height, image.width)
    image.draft("RGB", (width, height))
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} by {image.height} pixels, more than {MOST_PIXELS} in all")
    raw_mode = _raw_mode(image)
    image.load()
    upright = to_rgb(image, raw_mode)
    turn = _turn(image)
    if turn is not None:
        upright = upright.transpose(turn)
        if turn in _quarter_turns():
            height, width = width, height
    cut = image_ops.fit(upright, (width, height), image_module.Resampling.BILINEAR)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


def sides_in_file(file: Path) -> tuple[int, int]:
    """Return the height and the width that an image file states, before any turn.

    Nothing is decoded but the head of the file.

    Raises:
        ValueError: as in `decode_to`, except that only the head may be known to be damaged.
        RuntimeError: Pillow is not installed.
    """
    with _opened_by_name(file) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened_by_name(file: Path) -> Iterator[Any]:
    """Open an image; whatever goes wrong with it becomes one line that names the file."""
    with _one_line(printable(file), lambda: _head(file)):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            # To open a pipe would wait for a writer, and a device may do anything.
            raise ValueError("no regular file")
        if status.st_size > MOST_FILE_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than {MOST_FILE_BYTES}")
        with _SparingFile(file) as bytes_of_file, _opened(bytes_of_file) as image:
            yield image


@contextlib.contextmanager
def _one_line(name: str, head: Callable[[], bytes]) -> Iterator[None]:
    """Make one line, which begins with a name, of whatever goes wrong with an image.

    Args:
        name: what the image is called.
        head: returns the first bytes of its file.
    """
    image_module, _ = pillow()
    try:
        yield
    except image_module.UnidentifiedImageError:
        webp = _is_undecodable_webp(head())
        came = "WebP, which this Pillow cannot decode" if webp else "no readable one"
        raise ValueError(
            f"{name}: expected a JPEG or PNG image (or WebP or BMP), got {came}"
        ) from None
    except FileNotFoundError:
        raise ValueError(f"{name}: expected an image, got no such file") from None
    # A decoder may raise anything over a file that was made to be wrong: struct.error, TypeError,
    # KeyError, ZeroDivisionError, MemoryError. All of it means that there is no picture.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{name}: expected a whole JPEG or PNG image (or WebP or BMP), "
            f"got {printable(reason.splitlines()[0], 200)}"
        ) from None


class _SparingFile(io.BufferedReader):
    """A file that makes no room for more bytes than it has, however many Pillow wants to read.

    Python sets as much memory aside as a read asks for, and a damaged PNG may ask for 4 GiB.
    """

    def __init__(self, file: Path):
        super().__init__(io.FileIO(file))

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _BLOCK:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def _opened(file: _SparingFile | io.BytesIO) -> Any:
    """Open an image without decoding it."""
    image_module, _ = pillow()
    with _filters, warnings.catch_warnings():
        # Pillow warns of images that it still opens; what is decoded of them has a limit here.
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
        # Only these decoders run, whatever format a file claims to have.
        return image_module.open(file, formats=_formats(image_module))


def to_rgb(image: Any, raw_mode: str = "") -> Any:
    """Return an image of any of Pillow's modes in the mode RGB.

    - Grey of 16 bits (the modes I;16, in any byte order, and I) keeps its upper 8 bits, v >> 8;
      values of I outside of 0 to 65,535 count as the nearer end.
    - Grey of floating point (F) is in 0 to 255, as in Pillow; it is rounded, values outside count
      as the nearer end, and NaN as 0.
    - Pixels with alpha (LA, La, PA, RGBA, RGBa), and images of the modes 1, L, I;16, RGB and P that
      name transparent colours, are laid over GROUND.
    - The colours of the other modes (P, CMYK, YCbCr, HSV, RGBX, and LAB by way of sRGB) are
      converted by Pillow.

    Args:
        image: an image of Pillow.
        raw_mode: how the file holds the pixels, as Pillow calls it; matters to the transparent
            colour of a PNG of 2, 4, or 3 · 16 bits a pixel.

    Raises:
        ValueError: Pillow knows no way from the image's mode to RGB.
    """
    image_module, _ = pillow()
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        grey = image_module.fromarray(_eight_bits(values)).convert("RGB")
        return _over_ground(grey, values == key) if isinstance(key, int) else grey
    if mode == "1" and isinstance(key, int):
        return _over_ground(image.convert("RGB"), np.asarray(image) == bool(key))
    if mode == "L" and isinstance(key, int):
        return _over_ground(
            image.convert("RGB"), np.asarray(image) == key * _SPREAD.get(raw_mode, 1)
        )
    if mode == "RGB" and isinstance(key, tuple):
        # Pillow keeps the upper half of each sample of 16 bits, and so does the colour.
        colour = np.array(key) >> (8 if raw_mode == "RGB;16B" else 0)
        return _over_ground(image, (np.asarray(image) == colour).all(2))
    if mode == "LAB":
        return _lab_to_rgb(image)
    if mode in ("La", "RGBa"):  # the colours are multiplied by alpha
        image = image.convert(mode.upper())
    if mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
        ground = image_module.new("RGBA", image.size, (*GROUND, 255))
        return image_module.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    # In the mode RGB nothing is left of a transparent colour that another mode may have named.
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Return grey values of 16 or 32 bits, or of floating point, as uint8."""
    if values.dtype.kind == "f":
        return np.nan_to_num(values, nan=0.0).clip(0, 255).round().astype(np.uint8)
    return (values.clip(0, 0xFFFF) >> 8).astype(np.uint8)


def _over_ground(image: Any, transparent: np.ndarray) -> Any:
    """Return an RGB image whose transparent pixels, (height, width) bool, have the ground's colour.

    The other pixels stay as they are.
    """
    image_module, _ = pillow()
    pixels = np.array(image)
    pixels[transparent] = GROUND
    return image_module.fromarray(pixels)


def _lab_to_rgb(image: Any) -> Any:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")


def _turn(image: Any) -> Any:
    """Return the transposition that brings an image upright, or None where it is upright."""
    image_module, _ = pillow()
    turns = image_module.Transpose
    try:
        exif = image.getexif()
        # Every entry is read, so that a broken block counts as a whole, not up to its first fault.
        exif.tobytes()
        orientation = exif.get(_ORIENTATION)
    except Exception:  # broken EXIF can raise as much as a broken image
        return None
    return {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)


def _quarter_turns() -> tuple[Any, ...]:
    """Return the transpositions that exchange the height and the width."""
    turns = pillow()[0].Transpose
    return turns.TRANSPOSE, turns.ROTATE_270, turns.TRANSVERSE, turns.ROTATE_90


def _raw_mode(image: Any) -> str:
    """Return how the file of an image that is not loaded yet holds its pixels."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(next(iter(arguments or ()), ""))


def _formats(image_module: Any) -> list[str]:
    """Return those of our formats that this Pillow has a decoder for."""
    image_module.init()
    return [name for name in _FORMATS if name in image_module.OPEN]


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_HEAD)


def _is_undecodable_webp(head: bytes) -> bool:
    """Return whether a file that begins so is WebP, and Pillow was built without it."""
    from PIL import features

    return head[:4] == b"RIFF" and head[8:] == b"WEBP" and not features.check("webp")


def pillow() -> tuple[Any, Any]:
    """Return Pillow's modules Image and ImageOps. Raises RuntimeError where it is missing."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeError(
            "imagefolder: expected Pillow to be installed (pip install 'adatape-kernels[demo]')"
        ) from None
    return Image, ImageOps
