"""Measures what one core loads of images as large as ImageNet's, and writes it down for the cost.

    python -m adatape_kernels.benchmarks.imagenet_loading

Drawn JPEG files of about 500 by 375 pixels and 110 kB, which is ImageNet's mean, are prepared as
the recipe `imagenet` has it: decoded, cut to 224 pixels, moved, flipped, passed through
RandAugment, normalised and mixed. What counts is the processor's time of a process with one
thread, which other work on the machine changes less than the time that passes.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adatape_kernels.data import Normaliser
from adatape_kernels.data.image_file import decode, pillow
from adatape_kernels.data.image_folder import FolderImages
from adatape_kernels.data.loading import BatchMaker, BatchPlace
from adatape_kernels.recipes.training.train_config import TrainConfig

RESULT = Path(__file__).parent / "results/imagenet-loading.json"
WIDTH, HEIGHT, QUALITY = 500, 375, 94
_FILES, _BATCHES = 16, 4


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of coarse and fine noise, whose bytes are about as many as a photo's."""
    image_module, _ = pillow()
    draws = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = draws.integers(40, 215, (8, 10, 3), dtype=np.uint8)
        image = image_module.fromarray(coarse).resize((WIDTH, HEIGHT), 3)
        pixels = np.asarray(image) + draws.normal(0, 14, (HEIGHT, WIDTH, 1))
        files.append(folder / f"{number}.jpg")
        image = image_module.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(files[-1], quality=QUALITY)
    return files


def _rate(images: int, run: Callable[[], object]) -> float:
    """Return how many images a second of a processor's time gives."""
    run()
    begun = time.process_time()
    run()
    return images / (time.process_time() - begun)


def measured() -> dict[str, Any]:
    """Return the rates of one core, in images a second, and what they were measured with."""
    torch.set_num_threads(1)
    options = {"data": "imagefolder", "recipe": "imagenet"}
    config = TrainConfig.of(options)
    plainer = TrainConfig.of({**options, "randaugment": 0})
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), _FILES)
        decoding = _rate(_FILES, lambda: [decode(file, config.image_size) for file in files])
        size = sum(file.stat().st_size for file in files) / len(files)
        return {
            "decoded_per_core_second": round(decoding, 1),
            "prepared_without_randaugment": round(_prepared(files, plainer), 1),
            "prepared_per_core_second": round(_prepared(files, config), 1),
            "file_bytes": round(size),
            "sides": [WIDTH, HEIGHT],
            "processor": processor(),
        }


def _prepared(files: list[Path], config: TrainConfig) -> float:
    """Return how many images a second are prepared as a configuration has it."""
    maker = BatchMaker(
        FolderImages(files, config.image_size),
        torch.zeros(len(files), dtype=torch.long),
        num_classes=1000,
        batch=len(files),
        batches=1,
        seed=0,
        normalise=Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        make_augment=config.augmentation,
        mixup=config.mixup,
    )
    epochs = range(_BATCHES)
    return _rate(len(files) * _BATCHES, lambda: [maker[BatchPlace(epoch, 0)] for epoch in epochs])


def processor() -> str:
    """Return the processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    """Measure, and write the result."""
    found = measured()
    text = json.dumps(found, indent=2)
    RESULT.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
