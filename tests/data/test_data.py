import gzip
import io
import pickle

import numpy as np
import pytest
import torch
from checks import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import (
    cifar_arrays,
    cifar_pickle,
    idx_bytes,
    write_cifar_binary,
    write_cifar_python,
    write_folder,
    write_mnist,
)
from PIL import Image

from adatape_kernels import data
from adatape_kernels.data import Normaliser, augment, digits, load
from adatape_kernels.data.cifar10 import read_binary, read_python
from adatape_kernels.data.idx import read_idx
from adatape_kernels.data.image_folder import FolderImages, decode


def test_digits_are_split_by_class():
    found = digits()
    assert len(found.train_labels) == 1437 and len(found.test_labels) == 360
    assert found.test_labels.bincount().min() >= 34
    assert 0 <= found.train_images.min() and found.train_images.max() == 1
    assert not torch.equal(digits(1).test_labels, found.test_labels)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_give_back_what_was_written(tmp_path, name, compressed):
    arrays = write_mnist(tmp_path, compressed=compressed)
    found = load(name, tmp_path)
    assert found.num_classes == 10
    assert found.train_images.dtype == torch.uint8 and found.train_labels.dtype == torch.int64
    for ours, theirs in zip(
        (found.train_images[:, 0], found.train_labels, found.test_images[:, 0], found.test_labels),
        arrays,
        strict=True,
    ):
        assert np.array_equal(ours.numpy(), theirs)


def test_the_other_published_spelling_of_idx_names(tmp_path):
    write_mnist(tmp_path)
    for file in tmp_path.iterdir():
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    assert len(load("mnist", tmp_path).train_labels) == 60


def test_fashion_mnist_stands_where_debian_puts_it(tmp_path, monkeypatch):
    write_mnist(tmp_path / "fashion", compressed=True)
    monkeypatch.setattr(data, "FASHION_MNIST_FOLDER", tmp_path / "fashion")
    assert load("fashion-mnist").class_names[9] == "boot"
    monkeypatch.setattr(data, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    with refused("data-dir", "fashion-mnist", "got none"):
        load("fashion-mnist")


def test_names_and_folders_are_checked(tmp_path):
    (tmp_path / "file").touch()
    for name, folder, argument, words in (
        ("svhn", None, "data", "'svhn'"),
        ("digits", tmp_path, "data-dir", "none for digits"),
        ("mnist", None, "data-dir", "got none"),
        ("cifar10", tmp_path / "absent", "data-dir", "no such folder"),
        ("imagefolder", tmp_path / "file", "data-dir", "a file"),
        ("mnist", tmp_path, "data-dir", "train-images-idx3-ubyte.gz"),
        ("cifar10", tmp_path, "data-dir", "data_batch_1.bin"),
        ("imagefolder", tmp_path, "data-dir", "got 0"),
    ):
        with refused(argument, words):
            load(name, folder)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (IMAGES, lambda content: b"\x89PNG" + content[4:], "got 89 50 4e 47"),
        (IMAGES, lambda content: b"\0\0\x0d\3" + content[4:], "got 00 00 0d 03"),
        (IMAGES, lambda content: b"", "an empty file"),
        (IMAGES, lambda content: content[:9], "a cut file"),
        (IMAGES, lambda content: content[:-1], "got 47039"),
        (IMAGES, lambda content: content + b"\0", "got more"),
        (IMAGES, lambda content: content[:4] + b"\xff" * 12, "at most"),
        (IMAGES, lambda content: idx_bytes(np.zeros((60, 28, 27), np.uint8)), "(60, 28, 27)"),
        (IMAGES, lambda content: idx_bytes(np.zeros(60, np.uint8)), "got (60,)"),
        (LABELS, lambda content: content[:-1] + b"\x0a", "got 10 for image 59"),
        (LABELS, lambda content: idx_bytes(np.zeros(59, np.uint8)), "60 labels"),
        (LABELS, lambda content: idx_bytes(np.zeros((60, 1), np.uint8)), "got (60, 1)"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, file, change, words):
    write_mnist(tmp_path)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    with refused(path, words):
        load("mnist", tmp_path)


@pytest.mark.parametrize("change", [lambda c: c[:-9], lambda c: c[:40], lambda c: b"no" + c])
def test_a_damaged_gzip_is_named(tmp_path, change):
    write_mnist(tmp_path, compressed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with refused(path, "gzip"):
        load("mnist", tmp_path)


def test_a_gzip_whose_bits_are_wrong_is_named(tmp_path):
    write_mnist(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with refused(path):
        load("mnist", tmp_path)


@pytest.mark.parametrize("write", [write_cifar_binary, write_cifar_python])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin", "cifar-10-batches-py"])
def test_cifar10_gives_back_what_was_written(tmp_path, write, inner):
    write(tmp_path / inner)
    found = load("cifar10", tmp_path)
    assert found.train_images.shape == (20, 3, 32, 32) and found.test_images.shape == (4, 3, 32, 32)
    images, labels = cifar_arrays(4, seed=2)
    assert np.array_equal(found.train_images[8:12].flatten(1).numpy(), images)
    assert np.array_equal(found.train_labels[8:12].numpy(), labels)
    images, labels = cifar_arrays(4, seed=5)
    assert np.array_equal(found.test_images.flatten(1).numpy(), images)
    assert found.class_names[0] == "airplane"


def test_a_damaged_binary_batch_is_named(tmp_path):
    write_cifar_binary(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    content = path.read_bytes()
    for change, words in (
        (content[:-1], "got 12291 bytes"),
        (b"", "got 0 bytes"),
        (content[:3073] + b"\xc8" + content[3074:], "got 200 for image 1"),
    ):
        path.write_bytes(change)
        with refused(path, words):
            load("cifar10", tmp_path)
    path.unlink()
    with refused("data-dir", "data_batch_3.bin"):
        load("cifar10", tmp_path)


def test_a_damaged_python_batch_is_named(tmp_path):
    images, labels = cifar_arrays(3, seed=0)
    path = tmp_path / "batch"
    whole = cifar_pickle(images, labels.tolist())
    for content, words in (
        (whole[: len(whole) // 2], "CIFAR-10 batch"),
        (b"", "CIFAR-10 batch"),
        (cifar_pickle(images, [1, 2]), "each of 2 labels"),
        (cifar_pickle(images, [1, 2, 10]), "got 10"),
        (cifar_pickle(images, [1, 2, -1]), "got -1"),
        (cifar_pickle(images, labels.tolist(), dtype=b"f8"), "unsigned bytes"),
        (pickle.dumps([1, 2], 2), "CIFAR-10 batch"),
        (pickle.dumps({b"data": 1}, 2), "forbidden name _codecs.encode"),
    ):
        path.write_bytes(content)
        with refused(path, words):
            read_python(path)


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_runs_none(tmp_path, protocol):
    path, target = tmp_path / "batch", tmp_path / "target"
    path.write_bytes(pickle.dumps({"data": Hostile(target)}, protocol))
    with refused(path, "forbidden name"):
        read_python(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()


BATCH = cifar_pickle(
    *(array.tolist() if array.ndim == 1 else array for array in cifar_arrays(1, 0))
)
IDX = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
RECORDS = bytes(3073)


@settings(max_examples=150)
@given(
    st.sampled_from([(BATCH, read_python), (IDX, read_idx), (RECORDS, read_binary)]),
    st.integers(0, 4000),
    st.binary(max_size=6),
    st.integers(0, 6),
)
def test_any_damage_is_a_value_error_or_harmless(tmp_path_factory, format, place, put, removed):
    content, read = format
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[:place] + put + content[place + removed :])
    try:
        read(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: expected ") and "\n" not in str(error)


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
    with refused("data-dir", "val or test beside"):
        load("imagefolder", tmp_path / "a")
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


def test_a_part_of_the_training_images(tmp_path):
    write_mnist(tmp_path)
    whole = load("mnist", tmp_path)
    part = whole.limited(25, seed=0)
    assert len(part.train_images) == len(part.train_labels) == 25
    every = torch.arange(25)
    assert part.train_images[every].shape == (25, 1, 28, 28)
    assert part.test_images is whole.test_images
    other = whole.limited(25, seed=1)
    assert not torch.equal(part.train_images[every], other.train_images[every])
    for bad in (0, 61):
        with refused("limit", "1 to 60", str(bad)):
            whole.limited(bad, seed=0)
    write_folder(tmp_path / "folder", count=5)
    files = load("imagefolder", tmp_path / "folder", image_size=8).limited(3, seed=0)
    assert len(files.train_images) == len(files.train_labels) == 3
    colours = files.train_images[torch.arange(3)].float().mean((2, 3)).argmax(1)
    assert torch.equal(colours, files.train_labels)


def test_the_normaliser_gives_mean_0_and_deviation_1():
    images = torch.randint(256, (50, 3, 6, 6), dtype=torch.uint8)
    normalise = Normaliser.of(images)
    seen = normalise(images.float() / 255)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-5
    assert (seen.std((0, 2, 3)) - 1).abs().max() < 1e-5
    expected = images.double() / 255
    assert normalise.mean == pytest.approx(expected.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert normalise.std == pytest.approx(expected.std((0, 2, 3)).tolist(), rel=1e-10)
    one_colour = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    assert Normaliser.of(one_colour)(one_colour.float()).isfinite().all()


@pytest.mark.parametrize("number", [1, 2])
def test_the_normaliser_does_not_depend_on_threads(number):
    images = torch.arange(300 * 28 * 28).remainder(251).byte().view(300, 1, 28, 28)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        assert Normaliser.of(images) == Normaliser((0.4901702847805789,), (0.2841585941597321,))
    finally:
        torch.set_num_threads(before)


def test_augmented_images_stay_themselves():
    x = digits().train_images[:32]
    generator = torch.Generator().manual_seed(0)
    y = augment.turn_and_move(x, generator)
    assert y.shape == x.shape
    assert not torch.equal(y, x)
    assert torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1] > 0.6


def test_a_crop_moves_each_image_by_whole_pixels():
    x = torch.zeros(60, 2, 9, 7)
    x[:, 0, 4, 3], x[:, 1, 5, 3] = 1, 2
    y = augment.crop(x, 2, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    places = y[:, 0].flatten(1).argmax(1)
    assert places.unique().numel() > 15
    rows, columns = places // 7, places % 7
    assert set(rows.tolist()) == {2, 3, 4, 5, 6} and set(columns.tolist()) == {1, 2, 3, 4, 5}
    # Channels move together.
    assert torch.equal(y[:, 1].flatten(1).argmax(1), places + 7)


def test_a_flip_mirrors_about_half():
    x = torch.rand(200, 1, 3, 4)
    y = augment.flip(x, torch.Generator().manual_seed(0))
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert 70 < mirrored.sum() < 130
    assert torch.equal(y[~mirrored], x[~mirrored])


def test_gzip_files_carry_the_suffix(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(IDX))
    assert read_idx(path).shape == (2, 3, 4)
