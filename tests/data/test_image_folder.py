import io

import numpy as np
import pytest
import torch
from checks import refused
from image_files import write_folder

from adatape_kernels.data import load
from adatape_kernels.data.image_folder import FolderImages, decode

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def test_a_folder_of_classes_is_split_by_class_and_seed(tmp_path):
    write_folder(tmp_path, classes=("dog", "cat", "emu"), count=10)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    found = load("imagefolder", tmp_path, image_size=8, seed=3)
    assert found.class_names == ("cat", "dog", "emu")
    assert found.train_labels.bincount().tolist() == [8, 8, 8]
    assert found.test_labels.bincount().tolist() == [2, 2, 2]
    assert not set(found.train_images.files) & set(found.test_images.files)
    again = load("imagefolder", tmp_path, image_size=8, seed=3)
    assert again.test_images.files == found.test_images.files
    other = load("imagefolder", tmp_path, image_size=8, seed=4)
    assert other.test_images.files != found.test_images.files
    batch = found.train_images[torch.tensor([0, 9, 23])]
    assert batch.shape == (3, 3, 8, 8) and batch.dtype == torch.uint8
    assert batch.float().mean((2, 3)).argmax(1).tolist() == [1, 0, 2]  # cat was written second


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_with_its_own_split(tmp_path, test):
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / test, count=2)
    found = load("imagefolder", tmp_path, image_size=8)
    assert len(found.train_images) == 8 and len(found.test_images) == 4
    assert {file.parents[1].name for file in found.test_images.files} == {test}


def test_folders_that_are_no_image_sets(tmp_path):
    write_folder(tmp_path / "a" / "train")
    write_folder(tmp_path / "a" / "val", classes=("cat", "dot"))
    with refused("data-dir", "same classes", "'dog'"):
        load("imagefolder", tmp_path / "a")
    write_folder(tmp_path / "b", classes=("only",))
    with refused("data-dir", "two or more classes", "got 1"):
        load("imagefolder", tmp_path / "b")
    (tmp_path / "b" / "empty").mkdir()
    with refused("data-dir", str(tmp_path / "b" / "empty")):
        load("imagefolder", tmp_path / "b")
    write_folder(tmp_path / "c", count=1)
    with refused("data-dir", "two or more images", "got one"):
        load("imagefolder", tmp_path / "c")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((9, 12), 40_000, np.uint16)).save(path)
    else:
        Image.new("RGB", (12, 9), (200, 200, 200)).convert(mode).save(path)
    assert decode(path, 8).shape == (3, 8, 8)


def test_a_photo_is_turned_upright_and_cut_to_its_middle(tmp_path):
    path = tmp_path / "turned.jpg"
    image = Image.new("L", (64, 32))
    image.paste(255, (32, 0, 64, 32))  # the right half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(path, exif=exif, quality=95)
    upright = decode(path, 16)[0].float()
    assert upright[:4].mean() < 30 and upright[-4:].mean() > 225


def png(size):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)).save(
        stream, "PNG"
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"no image", "no readable one"),
        ("empty.jpg", b"", "no readable one"),
        ("cut.png", png((20, 20))[:200], "whole"),
        ("header.png", png((20, 20))[:20], "got"),
        (
            "gif.png",
            b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
            "no read",
        ),
    ],
)
def test_a_damaged_image_is_named_when_it_is_reached(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    images = FolderImages([path], 8)
    with refused(path, words):
        images[torch.tensor([0])]


def test_a_cut_jpeg_and_a_huge_png_are_named(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:1500])
    with refused(path, "whole"):
        decode(path, 8)
    content = bytearray(png((4, 4)))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    path.write_bytes(content)
    with refused(path):
        decode(path, 8)
    path.unlink()
    with refused(path, "no such file"):
        decode(path, 8)


def test_a_part_of_the_training_files_stays_undecoded(tmp_path):
    write_folder(tmp_path, count=5)
    files = load("imagefolder", tmp_path, image_size=8).limited(3, seed=0)
    assert len(files.train_images) == len(files.train_labels) == 3
    colours = files.train_images[torch.arange(3)].float().mean((2, 3)).argmax(1)
    assert torch.equal(colours, files.train_labels)
