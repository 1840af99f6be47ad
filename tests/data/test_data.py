import numpy as np
import pytest
import torch
from checks import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import cifar_arrays, cifar_pickle, idx_bytes, write_mnist

from adatape_kernels import data
from adatape_kernels.data import Normaliser, digits, load
from adatape_kernels.data.cifar10 import read_binary, read_python
from adatape_kernels.data.idx import read_idx


def test_digits_are_split_by_class():
    found = digits()
    assert len(found.train_labels) == 1437 and len(found.test_labels) == 360
    assert found.test_labels.bincount().min() >= 34
    assert 0 <= found.train_images.min() and found.train_images.max() == 1
    assert not torch.equal(digits(1).test_labels, found.test_labels)


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
