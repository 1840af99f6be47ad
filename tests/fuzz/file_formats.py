"""The file formats that the package reads: whole files to start from, and who reads them."""

import functools
import gzip
import io
import tempfile
from pathlib import Path

import image_files
import numpy as np

from adatape_kernels.data.cifar10 import read_binary, read_python
from adatape_kernels.data.idx import read_idx
from adatape_kernels.data.image_file import decode
from adatape_kernels.data.image_folder import image_folder

ROOT = Path(__file__).parents[2]
CHECKPOINT_OPTIONS = {
    "data": "digits", "dim": 8, "depth": 1, "heads": 1, "ffn": 8, "limit": 16, "epochs": 1,
    "batch": 8,
}  # fmt: skip


class Reached(Exception):
    """A run was resumed: everything in its folder was accepted."""


@functools.cache
def whole(name):
    """Return a format's files by name, as they should be."""
    return _WHOLE[name]()


def read(name, folder):
    """Read a folder of files in a format, as the package does."""
    return _READERS[name](folder)


def _image(kind):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(256, size=(12, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return {f"image.{kind.lower()}": stream.getvalue()}


def _class_folder():
    png = _image("PNG")["image.png"]
    return {f"{label}/{i}.png": png for label in ("cat", "dog") for i in range(3)}


def _read_class_folder(folder):
    import torch

    found = image_folder(folder, 8, 0)
    return found.train_images[torch.arange(len(found.train_images))]


def _checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        try:
            _train(Path(folder), CHECKPOINT_OPTIONS, False)
        except Reached:
            pass
        return {
            path.name: path.read_bytes()
            for path in Path(folder).iterdir()
            if path.name.startswith("checkpoint") and not path.name.endswith(".lock")
        }


def _resume(folder):
    try:
        return _train(folder, {}, True)
    except Reached:
        return "resumed"


def _train(folder, options, resume):
    """Start or resume a run, up to its first epoch."""
    from adatape_kernels.recipes.training import train as recipe

    def reached(*args, **kwargs):
        raise Reached

    loop, recipe.train = recipe.train, reached
    try:
        return recipe.run(folder, options, resume=resume)
    finally:
        recipe.train = loop


def _verify(folder):
    from adatape_kernels.recipes.verify import verify_file

    return verify_file(next(folder.iterdir()))


def _read_rows(folder):
    from adatape_kernels.benchmarks.harness import records

    return records.groups(records.read(folder / "rows.csv"))


def _rows():
    text = (ROOT / "benchmarks/results/cpu.csv").read_text().splitlines(keepends=True)
    return {"rows.csv": "".join(text[:6]).encode()}


def _idx():
    images, _ = image_files.bars(3)
    return image_files.idx_bytes(images)


def _batch():
    return image_files.cifar_arrays(2, 0)


def _binary():
    images, labels = _batch()
    return np.hstack([labels[:, None], images]).tobytes()


def _python():
    images, labels = _batch()
    return image_files.cifar_pickle(images, labels.tolist())


def _one_file(reader):
    return lambda folder: reader(next(folder.iterdir()))


_IMAGES = ("PNG", "JPEG", "BMP", "WEBP")
_GOLDEN = ("tape_read_learn_top1", "tape_read_input_full_key", "parity_input_token")
_WHOLE = {
    "cifar python": lambda: {"data_batch_1": _python()},
    "cifar binary": lambda: {"data_batch_1.bin": _binary()},
    "idx": lambda: {"images-idx3-ubyte": _idx()},
    "idx.gz": lambda: {"images-idx3-ubyte.gz": gzip.compress(_idx(), 1)},
    "class folders": _class_folder,
    "checkpoint": _checkpoint,
    "results csv": _rows,
    **{f"image {kind}": functools.partial(_image, kind) for kind in _IMAGES},
    **{
        f"npz {name}": functools.partial(
            lambda name: {f"{name}.npz": (ROOT / f"tests/golden/{name}.npz").read_bytes()}, name
        )
        for name in _GOLDEN
    },
}
_READERS = {
    "cifar python": _one_file(read_python),
    "cifar binary": _one_file(read_binary),
    "idx": _one_file(read_idx),
    "idx.gz": _one_file(read_idx),
    "class folders": _read_class_folder,
    "checkpoint": _resume,
    "results csv": _read_rows,
    **{f"image {kind}": _one_file(lambda file: decode(file, 8)) for kind in _IMAGES},
    **{f"npz {name}": _verify for name in _GOLDEN},
}
FORMATS = tuple(_WHOLE)
