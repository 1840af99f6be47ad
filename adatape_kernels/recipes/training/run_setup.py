"""What a run has read and checked before it makes a model: its options, then its images."""

import contextlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from adatape_kernels.data import ImageSet, Normaliser, load
from adatape_kernels.data.loading import decoded_ahead
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.distributed.begun_runs import goes_on
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.output_folder import check_output_folder, check_run_folder
from adatape_kernels.recipes.run_folder import RunFolder, check_empty_folder, claim
from adatape_kernels.recipes.run_images import folder_of_images
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.initial_model import InitialModel
from adatape_kernels.recipes.training.loading_options import Loading, with_draws
from adatape_kernels.recipes.training.option_checks import known_set, option_name
from adatape_kernels.recipes.training.run_loader import LookedAt
from adatape_kernels.recipes.training.run_request import RunRequest
from adatape_kernels.recipes.training.saved_run import extended, saved_run
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.tensorboard_events import (
    FOLDER,
    require_tensorboard,
)
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.unused_options import check_loading_used


@dataclass(frozen=True)
class RunSetup:
    """The options of a run, as far as they can be checked without its images."""

    folder: Path
    """The run's folder."""
    device: torch.device
    """Where is computed."""
    data_dir: str | Path | None
    """The folder of the images; None of a set without files."""
    saved: Checkpoint | None
    """What the run goes on from, extended where that is asked for; None of a new run."""
    claimed: RunFolder | None
    """What writes into the folder; of a new run, and on ranks that do not write, None."""
    start: SourceFile | InitialModel | None
    """What a new model begins with."""
    config: TrainConfig
    execution: Execution
    loading: Loading
    tensorboard: bool
    """Whether TensorBoard's events are written."""
    extended: bool
    """Whether the number of epochs is another one than the checkpoint's."""

    @classmethod
    def of(
        cls,
        request: RunRequest,
        device: torch.device,
        ranks: Ranks,
        until_the_end: contextlib.ExitStack,
    ) -> "RunSetup":
        """Read the run's checkpoint, or the file that it begins with, and check all options.

        Args:
            request: what is asked for.
            device: where is computed.
            ranks: the processes, of which the leading one claims a run that it goes on with.
            until_the_end: what holds the claim.

        Raises:
            ValueError: an option, a file or the folder is not what was expected.
            RuntimeError: a package is missing.
            OSError: a file cannot be read, or the folder cannot be written.
        """
        folder, data_dir = request.folder, request.data_dir
        pictures.require("train")
        resume = request.resume or goes_on(folder / checkpoint.INDEX, ranks)
        if resume:
            check_run_folder(folder)
        elif ranks.leads:  # others would make the folder and take it back at the same time
            check_output_folder(folder)
        claimed, saved, start, longer = None, None, None, False
        if resume:
            checkpoint.require(folder)
            # Another process may be about to write the next checkpoint, until the folder is ours.
            if ranks.leads:
                claimed = until_the_end.enter_context(claim(folder))
            # Where torchrun has started all anew, a run that this one began with may have gone on.
            init = request.init if request.resume else None
            found = saved_run(folder, request.options, request.source, init, extend=True)
            saved = extended(folder, found, request.options.get("epochs"))
            longer = saved is not found
            config = TrainConfig.of_saved(saved.config)
            data_dir = data_dir or folder_of_images(folder, saved)
        else:
            if ranks.leads:
                refuse_to_overwrite(folder)
            start, config = new_run(request)
        environment = None if saved is None else saved.environment
        execution = Execution.of_run(config.dtype, request.execution, environment)
        execution = replace(execution, ranks=ranks)
        loading = Loading.of_run(request.loading, environment)
        loading.check_options(config)
        execution.check_thresholds(config.halt_threshold_range)
        execution.check_device(device)
        if execution.parallel == "fsdp" and not ranks.several:
            say("adatape-kernels: note: --parallel fsdp divides nothing in a single process")
        config.require_packages()
        tensorboard = request.tensorboard
        if tensorboard is None:
            tensorboard = resume and (folder / FOLDER).is_dir()
        if tensorboard:
            require_tensorboard()
        done = 0 if saved is None else saved.epoch
        options = {**asdict(config), **execution.entries()}
        asked = {option_name(name): value for name, value in options.items()}
        ranks.check_agreement({"out: epochs": done, **asked})
        return cls(
            folder,
            device,
            data_dir,
            saved,
            claimed,
            start,
            config,
            execution,
            loading,
            tensorboard,
            longer,
        )


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run, and what is decided by their number and their pixels."""

    looked: LookedAt
    config: TrainConfig
    """The run's options, with a batch."""
    plan: TrainPlan
    normalise: Normaliser

    @property
    def data(self) -> ImageSet:
        """The image set."""
        return self.looked.data

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of the optimizer in an epoch."""
        return self.plan.steps_per_epoch(len(self.data.train_labels))

    @classmethod
    def of(cls, setup: RunSetup) -> "TrainingImages":
        """Load and look at the images, and print how they become batches.

        Raises:
            ValueError: there is no such set, or an image cannot be read and may not be skipped.
        """
        config = setup.config
        data = load(config.data, setup.data_dir, image_size=config.image_size, seed=config.split)
        if config.limit is not None:
            data = data.limited(config.limit, config.split)
        for note in data.notes:
            say(f"adatape-kernels: note: {note}")
        chosen = config.batch is None
        config.with_batch_for(len(data.train_labels))  # raises before any image is decoded
        looked = LookedAt.of(data, config, setup.loading, setup.execution.ranks)
        tested = decoded_ahead(looked.data.test_images, setup.loading.workers)
        looked = replace(looked, data=replace(looked.data, test_images=tested))
        config = config.with_batch_for(len(looked.data.train_labels))
        plan = config.plan()
        print(_plan_line(looked.data, plan, chosen))
        return cls(looked, config, plan, Normaliser.of(looked.sample))


def refuse_to_overwrite(out: Path) -> None:
    """Raise ValueError unless a folder is absent, or empty but for what a killed start has left."""
    if (out / checkpoint.INDEX).exists():
        raise ValueError(f"out: expected a new folder, or --resume, got {out}, which holds a run")
    check_empty_folder(out)


def new_run(request: RunRequest) -> tuple[SourceFile | InitialModel | None, TrainConfig]:
    """Return what a new run begins with, which is read, and its options. No image is read.

    Raises:
        ValueError: an option is out of range, or is not that of the model to begin with.
        OSError: a file cannot be read.
    """
    options = with_draws(request.options, request.loading)
    check_loading_used(request.loading, known_set(options.get("data")))
    if request.init is not None:
        model = InitialModel.read(request.init)
        config = TrainConfig.of(model.options(options), usual=model.own_options(options))
        return model, config
    if request.source is None:
        return None, TrainConfig.of(options)
    source = SourceFile.read(
        request.source, heads=options.get("heads"), activation=options.get("activation")
    )
    return source, TrainConfig.of(options, source)


def _plan_line(data: ImageSet, plan: TrainPlan, chosen: bool) -> str:
    """Return the line that is printed before training: the images, and how they become steps."""
    images = len(data.train_labels)
    steps, rest = plan.steps_per_epoch(images), images % plan.batch
    line = (
        f"{images:,} training images, {len(data.test_labels):,} test images, "
        f"{data.num_classes} classes; batch {min(plan.batch, images)}, "
        f"{steps:,} {'step' if steps == 1 else 'steps'} an epoch"
    )
    if rest and steps > 1 and not plan.drop_rest:
        line += f", the last of {rest} {'image' if rest == 1 else 'images'}"
    if rest and plan.drop_rest and images > plan.batch:
        line += f"; {rest} images are left out in each epoch, as the run began in version 0.1"
    return f"{line} (chosen by the set's size; --batch sets another)" if chosen else line
