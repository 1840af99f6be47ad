import gzip

import numpy as np
import pytest
import torch
from checks import refused
from image_files import idx_bytes, write_mnist

from adatape_kernels.data import load
from adatape_kernels.data.idx import read_idx


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


def test_gzip_files_carry_the_suffix(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((2, 3, 4), np.uint8))))
    assert read_idx(path).shape == (2, 3, 4)
