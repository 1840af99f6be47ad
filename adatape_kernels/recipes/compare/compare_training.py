"""What a worker process does for the comparison: it times some steps, or trains a model."""

import functools
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adatape_kernels.data import ImageSet, Normaliser, Preprocessing, load
from adatape_kernels.data.loading import UnreadableImages
from adatape_kernels.models import ImageClassifier
from adatape_kernels.models.model_file import serialised
from adatape_kernels.recipes.compare.compare_config import CompareRun
from adatape_kernels.recipes.devices import CPU, chosen_device, wait
from adatape_kernels.recipes.training.loading_options import Loading, LoadingOptions
from adatape_kernels.recipes.training.run_loader import LookedAt
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import EpochResult, train
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.worker_processes import Tell

_SECONDS_BETWEEN_MESSAGES = 0.3
# Steps of which the first ones, in which memory is new and caches are cold, are not counted.
_FIRST_STEPS, _COUNTED_STEPS = 2, 3
_MOST_STEPS = 500


class TrainTask(NamedTuple):
    """A run, and how and on what it is trained."""

    run: CompareRun
    config: TrainConfig
    data_dir: Path | None
    device: torch.device = CPU
    loading: Loading = Loading()


class TrainProgress(NamedTuple):
    """How far a run is."""

    run: CompareRun
    images: int
    """Number of images that it has trained on, each as often as it was."""
    step: int
    """Number of steps behind it."""
    steps: int
    """Number of all its steps."""
    loss: str
    """The loss as a progress bar shows it."""


class Training(NamedTuple):
    """What training a run came to."""

    seconds: float
    """What it took."""
    train_loss: float
    """Mean of the last epoch."""
    train_accuracy: float
    """Share of the training images of the last epoch that were classified right."""


class Trained(NamedTuple):
    """A run that has ended."""

    run: CompareRun
    training: Training
    model: bytes
    """A safetensors file."""


class StepTime(NamedTuple):
    """How long a training step of a run takes, by the image."""

    run: CompareRun
    seconds: float


class TimingTask(NamedTuple):
    """A run whose training steps are to be timed, for about so many seconds."""

    train: TrainTask
    seconds: float


def images_of(config: TrainConfig, data_dir: Path | None) -> tuple[ImageSet, Normaliser]:
    """Load the images that a configuration asks for, and look at none.

    Raises:
        ValueError, RuntimeError, OSError: as in `data.load`.
    """
    looked, normalise = looked_at(config, data_dir, Loading(look="none"))
    return looked.data, normalise


def looked_at(
    config: TrainConfig, data_dir: Path | None, loading: Loading
) -> tuple[LookedAt, Normaliser]:
    """Load the images that a configuration asks for, and look at those that are to be looked at.

    Raises:
        ValueError, RuntimeError, OSError: as in `data.load`, or an image cannot be read.
    """
    options = LoadingOptions(config.draws, config.unreadable, config.unreadable_limit)
    sizes = config.image_size, config.split, config.limit
    return _looked_at(config.data, data_dir, *sizes, options, loading)


# All tasks of a process are about the same images.
@functools.lru_cache(maxsize=1)
def _looked_at(
    name: str,
    data_dir: Path | None,
    image_size: int,
    split: int,
    limit: int | None,
    options: LoadingOptions,
    loading: Loading,
) -> tuple[LookedAt, Normaliser]:
    data = load(name, data_dir, image_size=image_size, seed=split)
    data = data if limit is None else data.limited(limit, split)
    looked = LookedAt.of(data, options, loading)
    return looked, Normaliser.of(looked.sample)


def new_model(config: TrainConfig, data: ImageSet, normalise: Normaliser) -> ImageClassifier:
    """Return the model of a run before any training."""
    torch.manual_seed(config.seed)
    return config.model(data.num_classes, len(normalise.mean))


def work(task: TrainTask | TimingTask, tell: Tell) -> Trained | StepTime:
    """Do what a task is about."""
    train_task = task.train if isinstance(task, TimingTask) else task
    if train_task.loading.workers:
        # A process that ends with the one that began it may have none of its own.
        multiprocessing.current_process().daemon = False
    return _timed(task) if isinstance(task, TimingTask) else _trained(task, tell)


def _prepared(task: TrainTask) -> tuple[LookedAt, Normaliser, TrainPlan, ImageClassifier]:
    config = task.config
    # The process that gives the tasks has looked at the images.
    looked, normalise = looked_at(config, task.data_dir, replace(task.loading, look="none"))
    plan = config.with_batch_for(len(looked.data.train_labels)).plan()
    model = new_model(config, looked.data, normalise).to(chosen_device(task.device))
    return looked, normalise, plan, model


def _trained(task: TrainTask, tell: Tell) -> Trained:
    """Train a run, and tell the progress now and then."""
    looked, normalise, plan, model = _prepared(task)
    data = looked.data
    last: list[EpochResult] = []

    def after_epoch(result: EpochResult) -> str:
        last[:] = [result]
        return ""

    steps = plan.epochs * plan.steps_per_epoch(len(data.train_labels))
    start = time.perf_counter()
    with looked.loader(task.config, plan, normalise, task.loading, task.device) as loader:
        train(
            model,
            data,
            plan,
            normalise,
            task.config.augmentation(),
            after_epoch=after_epoch,
            bar=_Teller(task.run, steps, tell),
            loader=loader,
        )
    seconds = time.perf_counter() - start
    preprocessing = Preprocessing.of(task.config.image_size, normalise)
    content = serialised(model, class_names=data.class_names, preprocessing=preprocessing)
    return Trained(task.run, Training(seconds, last[0].loss, last[0].accuracy), content)


def _timed(task: TimingTask) -> StepTime:
    """Time training steps of a new model: a few, and then as many as the seconds allow."""
    looked, normalise, plan, model = _prepared(task.train)
    given, data = task.train, looked.data
    augment, batch = given.config.augmentation(), min(plan.batch, len(data.train_labels))
    times: list[float] = []
    steps = _FIRST_STEPS + _COUNTED_STEPS
    # The first steps wait for workers, which begin with each loader.
    for skipped in (_FIRST_STEPS, _FIRST_STEPS if given.loading.workers else 0):
        clock = _Clock(given.device)
        plan = replace(plan, epochs=-(-steps * batch // len(data.train_labels)))
        some = data if plan.epochs > 1 else data.limited(steps * batch, 0)
        uncounted = UnreadableImages(given.config.unreadable_limit)
        own = replace(looked, data=some, train_unreadable=uncounted)
        with own.loader(given.config, plan, normalise, given.loading, given.device) as loader:
            train(model, some, plan, normalise, augment, bar=clock, loader=loader)
        times += clock.times[skipped:]
        spent = sum(clock.times)
        steps = min(_MOST_STEPS, int((task.seconds - spent) / (sum(times) / len(times) * batch)))
        if steps < 1:
            break
    return StepTime(task.train.run, sum(times) / len(times))


class _Listener:
    """Stands in the place of the training loop's progress bar."""

    def __enter__(self) -> "_Listener":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def set_postfix(self, shown: dict[str, str], refresh: bool) -> None:
        """Take what a bar would show."""

    def write(self, line: str) -> None:
        """Take a line that a bar would leave above it."""


class _Clock(_Listener):
    """Notes the seconds that each step took, by the image."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device
        self._last = time.perf_counter()

    def update(self, images: int) -> None:
        wait(self._device)
        now = time.perf_counter()
        self.times.append((now - self._last) / images)
        self._last = now


class _Teller(_Listener):
    """Tells how far a run is."""

    def __init__(self, run: CompareRun, steps: int, tell: Tell):
        self._run, self._steps, self._tell = run, steps, tell
        self._images = self._step = 0
        self._last = time.monotonic()
        self._loss = ""

    def set_postfix(self, shown: dict[str, str], refresh: bool) -> None:
        self._loss = shown["loss"]

    def update(self, images: int) -> None:
        self._images += images
        self._step += 1
        if (now := time.monotonic()) - self._last >= _SECONDS_BETWEEN_MESSAGES:
            self._last = now
            self._tell(TrainProgress(self._run, self._images, self._step, self._steps, self._loss))
