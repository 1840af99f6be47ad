import pickle

import numpy as np
import pytest
from checks import refused
from image_files import cifar_arrays, cifar_pickle, write_cifar_binary, write_cifar_python

from adatape_kernels.data import load
from adatape_kernels.data.cifar10 import read_python


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
        (pickle.dumps({b"data": 1}, 2), "no entry 'labels'"),
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
