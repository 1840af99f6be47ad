"""Small image sets written as the public ones are published."""

import gzip
import struct

import numpy as np

_NAMES = (
    ("train", "images", "idx3"),
    ("train", "labels", "idx1"),
    ("t10k", "images", "idx3"),
    ("t10k", "labels", "idx1"),
)


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def bars(count, classes=10, seed=0):
    """Images (count, 28, 28) uint8 of noise with a bright bar at a height that tells the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count, dtype=np.uint8)
    labels[:classes] = np.arange(min(count, classes))
    images = rng.integers(60, size=(count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 7 + 2 * label, 6:22] = 220
    return images, labels


def write_mnist(folder, train=60, test=20, compressed=False):
    """Write MNIST's four files; return (train images, train labels, test images, test labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (*bars(train), *bars(test, seed=1))
    for (part, kind, idx), array in zip(_NAMES, arrays, strict=True):
        content = idx_bytes(array)
        name = f"{part}-{kind}-{idx}-ubyte"
        if compressed:
            name, content = f"{name}.gz", gzip.compress(content, 1)
        (folder / name).write_bytes(content)
    return arrays


def cifar_arrays(count, seed):
    """Random images (count, 3072) and labels (count,), both uint8."""
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, 3072), dtype=np.uint8)
    return images, rng.integers(10, size=count, dtype=np.uint8)


CIFAR_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def write_cifar_binary(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CIFAR_NAMES):
        images, labels = cifar_arrays(count, seed)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None], images]).tobytes())


def write_cifar_python(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CIFAR_NAMES):
        images, labels = cifar_arrays(count, seed)
        (folder / name).write_bytes(cifar_pickle(images, labels.tolist()))


def cifar_pickle(images, labels, dtype=b"u1"):
    """A published batch: the pickle that Python 2 wrote of its dictionary of four entries."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    def integer(number):
        return b"J" + struct.pack("<i", number)

    content = images.tobytes()
    return b"".join(
        [
            b"\x80\x02}(",
            short(b"batch_label") + short(b"training batch 1 of 5"),
            short(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e",
            short(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\n" + b"K\x00\x85" + short(b"b") + b"\x87R",
            b"(K\x01" + integer(images.shape[0]) + integer(images.shape[1]) + b"\x86",
            b"cnumpy\ndtype\n" + short(dtype) + b"K\x00K\x01\x87R",
            b"(K\x03" + short(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb",
            b"\x89" + b"T" + struct.pack("<i", len(content)) + content + b"tb",
            short(b"filenames") + b"](" + short(b"a.png") + b"e",
            b"u.",
        ]
    )


def write_folder(folder, classes=("cat", "dog"), count=5, size=(20, 16), suffixes=(".png", ".jpg")):
    """Write `count` images for each class, which has a colour of its own, with noise."""
    from PIL import Image

    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            rng = np.random.default_rng([number, image])
            pixels = rng.integers(40, size=(size[1], size[0], 3), dtype=np.uint8)
            pixels[..., number % 3] += 180
            file = folder / name / f"{image}{suffixes[image % len(suffixes)]}"
            Image.fromarray(pixels).save(file)
