"""A file that is no whole image: a picture, or one line that names the file."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from checks import refused

from adatape_kernels.data import ImageSet
from adatape_kernels.data.image_file import decode
from adatape_kernels.data.image_folder import FolderImages

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
pytestmark = pytest.mark.filterwarnings("ignore")

# More are tried by ADATAPE_MUTATIONS=8000 pytest tests/data/test_damaged_images.py.
MUTATIONS = int(os.environ.get("ADATAPE_MUTATIONS", "640"))


def colours(mode):
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).convert(mode)


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif(orientation=6):
    block = Image.Exif()
    block[0x0112], block[0x010F], block[0x011A] = orientation, "maker", 72.5
    return block


def originals():
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    return [
        saved(colours("RGB"), "JPEG", exif=exif()),
        saved(colours("CMYK"), "JPEG", exif=exif()),
        saved(colours("RGB"), "JPEG", progressive=True),
        saved(colours("RGB"), "PNG", exif=exif()),
        saved(colours("L"), "PNG", transparency=7),
        saved(colours("P"), "PNG", transparency=b"\0\x80\xff"),
        saved(grey16, "PNG"),
        saved(colours("P"), "BMP"),
    ]


def mutated(content, rng):
    content = bytearray(content)
    kind = rng.integers(5)
    if kind == 0:
        for place in rng.integers(len(content), size=4):
            content[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del content[rng.integers(len(content)) :]
    elif kind == 2:
        for place in rng.integers(min(300, len(content)), size=8):
            content[place] = rng.integers(256)
    elif kind == 3 and content.startswith(b"\x89PNG"):
        sides = [int(side) for side in rng.choice([0, 1, 7, 65535, 2**31 - 1], size=2)]
        content[16:24] = struct.pack(">II", *sides)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        place = rng.integers(len(content))
        content[place : place + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31, 2**32 - 1])))
    return bytes(content)


def test_mutated_files_are_a_picture_or_one_line(tmp_path):
    rng, files = np.random.default_rng(7), originals()
    path = tmp_path / "image.jpg"
    pictures = 0
    for number in range(MUTATIONS):
        path.write_bytes(mutated(files[number % len(files)], rng))
        try:
            image = decode(path, 8)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: expected ") and ", got " in message
            assert "\n" not in message
        else:
            assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
            pictures += 1
    assert 0.1 * MUTATIONS < pictures < 0.9 * MUTATIONS


def exif_block(content):
    start = content.find(b"Exif\0\0")
    return start, start - 2 + struct.unpack(">H", content[start - 2 : start])[0]


def test_a_broken_exif_alone_gives_the_picture_as_it_is(tmp_path):
    path, content = tmp_path / "image.jpg", saved(colours("RGB"), "JPEG", exif=exif())
    start, end = exif_block(content)
    path.write_bytes(saved(colours("RGB"), "JPEG"))
    as_it_is = decode(path, 8)
    path.write_bytes(content)
    turned = decode(path, 8)
    assert not torch.equal(turned, as_it_is)
    rng = np.random.default_rng(3)
    for number in range(200):
        broken = bytearray(content)
        for place in rng.integers(start, end, size=1 + number % 9):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        assert decode(path, 8).shape == (3, 8, 8)
    path.write_bytes(content[: start + 6] + bytes(end - start - 6) + content[end:])
    assert torch.equal(decode(path, 8), as_it_is)


def test_a_broken_rational_beside_an_orientation(tmp_path):
    """The block is one of big-endian entries: orientation 6, and a resolution typed as a text."""
    path = tmp_path / "image.jpg"
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    # A rational of which the offset lies behind the end of the block.
    rational = struct.pack(">HHII", 0x011A, 5, 1, 4000)
    tiff = b"MM\0*" + struct.pack(">IH", 8, 2) + orientation + rational + bytes(4)
    path.write_bytes(saved(colours("RGB"), "JPEG", exif=b"Exif\0\0" + tiff))
    assert decode(path, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("error", [TypeError, struct.error, KeyError, MemoryError, RecursionError])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    path = tmp_path / "image.png"
    path.write_bytes(saved(colours("RGB"), "PNG"))

    def load(self):
        raise error("first line\nsecond")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load, raising=False)
    with refused(path, "first line"):
        decode(path, 8)


def test_what_is_no_file_is_never_opened(tmp_path):
    pipe, folder = tmp_path / "pipe.png", tmp_path / "folder.png"
    os.mkfifo(pipe)
    folder.mkdir()
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(tmp_path / "socket.png"))
    for path in (pipe, folder, tmp_path / "socket.png"):
        with refused(path, "no regular file"):
            decode(path, 8)
    local.close()
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with refused(loop):
        decode(loop, 8)


def test_a_name_of_two_lines_gives_one_line(tmp_path):
    path = tmp_path / "two\nlines.png"
    path.write_bytes(b"no image")
    with refused(str(path).replace("\n", "\\n"), "no readable one"):
        decode(path, 8)


def test_a_look_finds_the_damaged_file_wherever_it_is(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for file in files:
        file.write_bytes(saved(colours("RGB"), "PNG"))
    images = FolderImages(files, 8)
    labels = torch.zeros(len(files), dtype=torch.long)
    data = ImageSet(images, labels, images, labels, ("one",))
    data.look()
    data.limited(3, seed=0).look()
    files[37].write_bytes(files[37].read_bytes()[:-900])
    with refused(files[37], "whole"):
        data.look()
