"""What trained models do on the test images: accuracy, FLOPs, rows, and images per second."""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.image_set import read_in_order, unit_range
from adatape_kernels.models import AdaTapeOutput, AdaTapeViT, ImageClassifier
from adatape_kernels.recipes import measure
from adatape_kernels.recipes.compare.compare_config import CompareRun
from adatape_kernels.recipes.devices import CPU, device_of, moved, wait
from adatape_kernels.recipes.measure import Timing
from adatape_kernels.recipes.model_comparison import rows_by_layer
from adatape_kernels.recipes.training.train_loop import PREDICT_BATCH, accuracy, predict

_CALIBRATION_PASSES = 3


class Measured(NamedTuple):
    """What a model does on the test images."""

    accuracy: float
    flops_per_image: float
    mean_rows: float
    mean_tape_tokens: float | None


def measured(model: ImageClassifier, data: ImageSet, normalise: Normaliser) -> Measured:
    """Return what a model computes for the test images, and how often it is right."""
    found: list[AdaTapeOutput] = []
    flops = measure.flops(lambda: found.append(predict(model, data.test_images, normalise)))
    (output,) = found
    images, tape = len(data.test_labels), None
    if isinstance(model, AdaTapeViT):
        tape = output.tape_lens.double().mean().item()
    rows = _mean_rows(model, output)
    return Measured(accuracy(output, data.test_labels), flops / images, rows, tape)


def _mean_rows(model: ImageClassifier, output: AdaTapeOutput) -> float:
    """Return how many rows an image has in all layers together, on average."""
    if not isinstance(model, AdaTapeViT):
        return sum(rows_by_layer(model, output)) / len(output)
    config = model.config
    rows = float(config.depth * (config.num_patches + model.num_prefix_tokens))
    for layer, read in zip(sorted(config.read_layers), output.reads, strict=True):
        rows += (config.depth - layer) * read.counts.double().mean().item()
    return rows


def timed(
    models: Mapping[CompareRun, ImageClassifier],
    data: ImageSet,
    normalise: Normaliser,
    rounds: int,
    behind: Callable[[int], None],
) -> dict[CompareRun, Timing]:
    """Time passes over the test images, batch by batch all models in turn.

    A machine that is busy for a while is so for all of them, and reading and normalising images is
    not timed.

    Args:
        models: the trained models, all on one device.
        data: its test half is used.
        normalise: what the models were trained with.
        rounds: number of passes.
        behind: called with the number of images that every model has seen since the last call.

    Returns:
        The time of a pass of each.
    """
    times: dict[CompareRun, list[float]] = {run: [] for run in models}
    device = CPU
    for model in models.values():
        model.eval()
        device = device_of(model)
    for round_ in range(rounds):
        for images in _batches(data, normalise):
            images = moved(images, device)
            for run, model in models.items():
                seconds = _forward_seconds(model, images)
                if len(times[run]) <= round_:
                    times[run].append(0.0)
                times[run][-1] += seconds
            behind(len(images))
    return {run: Timing.of(own) for run, own in times.items()}


def seconds_by_image(model: ImageClassifier, images: Tensor) -> float:
    """Return what a forward pass over a batch takes by the image, beyond the first pass."""
    model.eval()
    images = moved(images, device_of(model))
    times = [_forward_seconds(model, images) for _ in range(1 + _CALIBRATION_PASSES)]
    return median(times[1:]) / len(images)


def first_batch(data: ImageSet, normalise: Normaliser) -> Tensor:
    """Return the first test images as models take them."""
    count = min(PREDICT_BATCH, len(data.test_labels))
    return normalise(unit_range(data.test_images[torch.arange(count)]))


def _batches(data: ImageSet, normalise: Normaliser) -> Iterator[Tensor]:
    parts = torch.arange(len(data.test_labels)).split(PREDICT_BATCH)
    with read_in_order(data.test_images, parts) as batches:
        for batch in batches:
            yield normalise(unit_range(batch))


def _forward_seconds(model: ImageClassifier, images: Tensor) -> float:
    wait(images.device)
    start = time.perf_counter()
    with torch.no_grad():
        model(images)
    wait(images.device)
    return time.perf_counter() - start
