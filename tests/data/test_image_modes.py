"""Every mode of Pillow becomes red, green and blue by what it means."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch

from adatape_kernels.data.image_file import GROUND, decode, to_rgb

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")

RED, HALF = (200, 40, 90), 128
LAID_OVER_GROUND = [
    round((HALF * colour + (255 - HALF) * ground) / 255)
    for colour, ground in zip(RED, GROUND, strict=True)
]


def pixels(image):
    image = to_rgb(image)
    assert image.mode == "RGB"
    return np.array(image)


def plain(mode, value):
    return Image.new(mode, (3, 2), value)


def from_bytes(mode, content):
    return Image.frombytes(mode, (1, 1), content)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain("1", 1), (255, 255, 255)),
        (plain("1", 0), (0, 0, 0)),
        (plain("L", 77), (77, 77, 77)),
        (plain("RGB", RED), RED),
        (plain("RGBX", (*RED, 0)), RED),
        (plain("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
        (plain("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (plain("HSV", (0, 255, 255)), (255, 0, 0)),
        (plain("YCbCr", (128, 128, 128)), (128, 128, 128)),
        (plain("RGBA", (*RED, 255)), RED),
        (plain("RGBA", (*RED, 0)), GROUND),
        (plain("RGBA", (*RED, HALF)), LAID_OVER_GROUND),
        (plain("LA", (77, 255)), (77, 77, 77)),
        (plain("LA", (77, 0)), GROUND),
        (from_bytes("RGBa", bytes([100, 20, 45, 128])), None),
        (from_bytes("La", bytes([0, 0])), GROUND),
        (from_bytes("I;16", struct.pack("<H", 40_000)), (156,) * 3),
        (from_bytes("I;16L", struct.pack("<H", 40_000)), (156,) * 3),
        (from_bytes("I;16B", struct.pack(">H", 40_000)), (156,) * 3),
        (plain("I", 40_000), (156,) * 3),
        (plain("I", 70_000), (255,) * 3),
        (plain("I", -5), (0,) * 3),
        (plain("F", 99.6), (100,) * 3),
        (plain("F", 1e9), (255,) * 3),
        (plain("F", -1.0), (0,) * 3),
        (plain("F", float("nan")), (0,) * 3),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_a_mode_by_its_meaning(image, expected):
    if expected is None:  # alpha has been multiplied in: half of the colour, half of the ground
        expected = [c + round(127 * g / 255) for c, g in zip((100, 20, 45), GROUND, strict=True)]
    found = pixels(image).astype(int)
    assert np.abs(found - np.array(expected)).max() <= 1, (found[0, 0], expected)


def test_lab_is_a_colour_space():
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(plain("RGB", RED), *profiles, outputMode="LAB")
    assert np.abs(pixels(lab).astype(int) - RED).max() <= 3


def test_palettes_with_and_without_transparency():
    image = plain("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(pixels(image).astype(int) - RED).max() <= 1
    index = int(np.array(image)[0, 0])
    image.info["transparency"] = index
    assert (pixels(image) == GROUND).all()
    image.info["transparency"] = bytes([255] * index + [HALF])
    assert np.abs(pixels(image).astype(int) - LAID_OVER_GROUND).max() <= 1
    both = plain("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    both.putalpha(0)
    assert (pixels(both) == GROUND).all()


def png(depth, kind, samples, key):
    """A PNG of one row of pixels, written by hand, since Pillow writes some depths only."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    width = len(samples) // (3 if kind == 2 else 1)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
            chunk(b"IDAT", zlib.compress(row)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize(
    ("depth", "kind", "samples", "key", "expected"),
    [
        (1, 0, [0, 1], [0], [GROUND, (255,) * 3]),
        (1, 0, [0, 1], [1], [(0,) * 3, GROUND]),
        (2, 0, [1, 2], [2], [(85,) * 3, GROUND]),
        (4, 0, [5, 10], [5], [GROUND, (170,) * 3]),
        (8, 0, [5, 10], [10], [(5,) * 3, GROUND]),
        (16, 0, [0x1234, 0x1235], [0x1234], [GROUND, (0x12,) * 3]),
        (8, 2, [1, 2, 3, 1, 2, 4], [1, 2, 3], [GROUND, (1, 2, 4)]),
        (16, 2, [0x100, 0x200, 0x300, 0, 0, 0], [0x100, 0x200, 0x300], [GROUND, (0, 0, 0)]),
    ],
)
def test_the_transparent_colour_of_a_png(tmp_path, depth, kind, samples, key, expected):
    content = png(depth, kind, samples, key)
    image = Image.open(io.BytesIO(content))
    raw = image.tile[0][3]
    assert pixels_of(image, raw) == [tuple(colour) for colour in expected]
    # The file as a whole takes the same way.
    (tmp_path / "image.png").write_bytes(content)
    square = decode(tmp_path / "image.png", 1)
    assert square.shape == (3, 1, 1)


def pixels_of(image, raw):
    image.load()
    return [tuple(pixel) for pixel in np.array(to_rgb(image, raw))[0].tolist()]


def test_grey_of_16_bits_from_a_file(tmp_path):
    path = tmp_path / "grey.png"
    values = np.repeat(np.arange(0, 65536, 4096, dtype=np.uint16), 16).reshape(16, 16)
    Image.fromarray(values).save(path)
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 16, 16)
    assert torch.equal(decode(path, 16), expected)


@pytest.mark.parametrize(("name", "form"), [("a.webp", "WEBP"), ("a.bmp", "BMP")])
def test_other_formats(tmp_path, name, form):
    from PIL import features

    if form == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    plain("RGB", RED).save(tmp_path / name, form, **({"lossless": True} if form == "WEBP" else {}))
    assert decode(tmp_path / name, 2)[:, 0, 0].tolist() == list(RED)
