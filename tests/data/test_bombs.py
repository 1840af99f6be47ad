"""Small files that ask for much: idx files, compressed or not, and images."""

import gzip
import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refused
from image_files import idx_bytes
from limited_process import run_limited

from adatape_kernels.data.idx import read_idx
from adatape_kernels.data.image_file import MOST_FILE_BYTES, decode

# More are tried by ADATAPE_MUTATIONS=80000 pytest tests/data/test_bombs.py.
MUTATIONS = int(os.environ.get("ADATAPE_MUTATIONS", "3000"))
LIMITS = pytest.mark.skipif(sys.platform != "linux", reason="the limit is read from /proc")
AXES = struct.Struct(">BBBB3I")


def zeros_compressed(header, size):
    """A header and zeros, compressed as far as gzip can."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(header)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def axes(*lengths):
    return struct.pack(f">BBBB{len(lengths)}I", 0, 0, 8, len(lengths), *lengths)


READ = """
import pathlib
from adatape_kernels.data.idx import read_idx
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print("read", tuple(read_idx(path).shape))
    except ValueError as error:
        print(error)
"""


@LIMITS
def test_an_idx_file_that_asks_for_more_than_it_holds_is_one_line(tmp_path):
    bomb = zeros_compressed(axes(1 << 29), 1 << 29)  # more than the process may hold
    files = {
        "bomb.gz": bomb,
        "many-bombs.gz": bomb * 3,
        "long.gz": zeros_compressed(axes(100), 1 << 29),
        "promise.gz": gzip.compress(axes(1 << 27)),
        "promise": axes(1 << 29),
        "vast": axes(2**32 - 1, 2**32 - 1, 2**32 - 1),
        "half": axes(2**31),
        "empty": axes(0, 2**32 - 1, 2**32 - 1),
        "axes": b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\0",
        "name.gz": b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 1_000_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    lines = run_limited(READ, tmp_path, megabytes=400).splitlines()
    assert len(lines) == len(files)
    for name, line in zip(sorted(files), lines, strict=True):
        assert line.startswith(f"{tmp_path / name}: expected ") and ", got " in line, line


def test_images_that_compress_well_are_read(tmp_path):
    """A file of one colour is a file too, up to the size of the largest of MNIST."""
    path = tmp_path / "images.gz"
    path.write_bytes(zeros_compressed(axes(64 << 10, 32, 32), 64 << 20))
    assert read_idx(path).shape == (65536, 32, 32)


@pytest.mark.parametrize("compressed", [False, True])
def test_mutated_idx_files_are_read_or_one_line(tmp_path, compressed):
    rng = np.random.default_rng(3)
    content = idx_bytes(rng.integers(256, size=(3, 4, 5), dtype=np.uint8))
    content = gzip.compress(content, 1) if compressed else content
    path, read = tmp_path / ("images.gz" if compressed else "images"), 0
    for _ in range(MUTATIONS):
        changed = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        if rng.integers(4) == 0:
            del changed[rng.integers(len(content)) :]
        path.write_bytes(changed)
        try:
            found = read_idx(path)
            assert found.dtype == torch.uint8 and found.numel() >= 1
            read += 1
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: expected ") and ", got " in message, message
            assert message.isprintable() and len(message) < 500, message
    assert read < 0.8 * MUTATIONS


def png(width, height, colour=0, depth=8, chunks=b""):
    """A PNG of zeros: colour 0 is grey, 3 a palette, 6 with alpha."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    samples = {0: 1, 3: 1, 6: 4}[colour]
    row = bytes(1 + (width * samples * depth + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0") if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), palette, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (8193, 8192, "8193 by 8192 pixels"),
        (12_000, 12_000, "12000 by 12000 pixels"),
        (20_000, 20_000, "decompression bomb"),
    ],
)
def test_an_image_of_too_many_pixels_is_one_line(tmp_path, width, height, words):
    pytest.importorskip("PIL")
    path = tmp_path / "image.png"
    path.write_bytes(png(width, height, depth=1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with refused(path, words):
            decode(path, 8)
    assert not warned


def test_an_image_file_of_too_many_bytes_is_one_line(tmp_path):
    pytest.importorskip("PIL")
    path = tmp_path / "image.webp"
    path.write_bytes(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
    with path.open("r+b") as stream:
        stream.truncate(MOST_FILE_BYTES + 1)
    with refused(path, "more than"):
        decode(path, 8)


def test_a_photograph_of_a_hundred_million_pixels_is_read_without_a_word(tmp_path):
    """A JPEG is decoded at an eighth of its sides."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "photograph.jpg"
    image.new("L", (12_000, 9_000), 100).save(path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pixels = decode(path, 8)
    assert pixels.shape == (3, 8, 8) and bool((pixels == 100).all())
    assert not warned


DECODE = """
from pathlib import Path
from adatape_kernels.data.image_folder import FolderImages
import torch
print(tuple(FolderImages([Path(sys.argv[1])] * 2, 8)[torch.arange(2)].shape))
"""


@LIMITS
def test_the_largest_image_takes_the_memory_that_is_stated(tmp_path):
    pytest.importorskip("PIL")
    path = Path(tmp_path) / "image.png"
    path.write_bytes(png(8192, 8192, colour=3))
    assert run_limited(DECODE, path, megabytes=2 * 1200) == "(2, 3, 8, 8)\n"


DECODE_EACH = """
import pathlib, sys
from adatape_kernels.data.image_file import decode
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print(file.name, tuple(decode(file, 8).shape))
    except ValueError as error:
        print(file.name, error)
"""


@LIMITS
def test_a_png_chunk_that_claims_four_gigabytes_makes_no_room_for_them(tmp_path):
    image = pytest.importorskip("PIL.Image")
    whole = io.BytesIO()
    image.effect_noise((16, 16), 50).save(whole, "PNG", compress_level=1)
    whole = whole.getvalue()
    at = 8
    while at < len(whole):
        (length,) = struct.unpack_from(">I", whole, at)
        damaged = bytearray(whole)
        damaged[at] = damaged[at + 1] = 0xFF
        (tmp_path / f"{at:04}.png").write_bytes(damaged)
        at += length + 12
    # The palette of a BMP has as many colours as its header says.
    bitmap = io.BytesIO()
    image.new("P", (4, 4)).save(bitmap, "BMP")
    damaged = bytearray(bitmap.getvalue())
    damaged[46:50] = b"\xff" * 4
    (tmp_path / "palette.bmp").write_bytes(damaged)
    printed = run_limited(DECODE_EACH, tmp_path)
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == sorted(file.name for file in tmp_path.iterdir()), printed
    assert "MemoryError" not in printed
