"""Training on an image set from local files, with checkpoints and a report."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from adatape_kernels.models import ImageClassifier
from adatape_kernels.models.model_file import FILE
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint_index import epoch_of
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.divided_parameters import whole_model
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.model_comparison import ModelComparison
from adatape_kernels.recipes.model_report import write_report
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.epoch_metrics import WORK, epoch_line
from adatape_kernels.recipes.training.run_record import RunRecord
from adatape_kernels.recipes.training.run_request import RunRequest
from adatape_kernels.recipes.training.run_setup import RunSetup, TrainingImages
from adatape_kernels.recipes.training.saved_run import saved_run
from adatape_kernels.recipes.training.train_loop import EpochResult, train
from adatape_kernels.recipes.training.trained_model import TrainedModel

ROUNDS = 7
"""Number of times that the report repeats each timing."""


def run(
    out: str | Path,
    options: Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    source: str | Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    execution: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    tensorboard: bool | None = None,
) -> ModelComparison | None:
    """Train, or go on with a run, and write its report into `out`.

    Under torchrun the processes share each step, and rank 0 writes what is written. Where torchrun
    has started them anew, the run goes on from its last checkpoint.

    At the start config.yaml, the options with which the command trains the same run again, and
    after each epoch checkpoint.json, the safetensors file that it names and metrics.csv, which has
    a row for each epoch, are written into `out`, and best.safetensors where the epoch was the best
    so far; in the end report.json, model.safetensors and the pictures, as the demo writes them.

    Args:
        out: a new or empty folder, or one that holds a run to resume.
        options: values by field of TrainConfig; absent or None where the default is wanted, or on
            resume what the run was started with. On resume another number of epochs extends the
            run, as `saved_run.extended` says.
        data_dir: the image set's folder, as in `data.load`; on resume None is where it was.
        source: a safetensors file with the parameters of a ViT of timm or torchvision, to begin
            with; None for a new model. A run that is resumed no longer needs it.
        init: a model's file or the folder of a run of this package, whose model to begin with; None
            for a new one. A run that is resumed no longer needs it.
        resume: go on from the folder's checkpoint, on whatever device it was written.
        device: where to compute, as `devices.chosen_device` has it.
        execution: values by field of Execution, but for the dtype, which is one of the options;
            absent or None for what the run was last computed with.
        loading: values by field of Loading; absent or None as those of `execution`.

    Returns:
        What the report compares; None on other ranks than rank 0.

    Raises:
        ValueError: an option, the image set, or the checkpoint is not what was expected.
        RuntimeError: a package is missing, or a loss or a logit of a test image is not finite; the
            checkpoint is then that of the epoch before.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: the run was interrupted; the message says which epoch `out` holds.
    """
    with lenient_output(), contextlib.ExitStack() as until_the_end:
        where = chosen_device(device)
        ranks = until_the_end.enter_context(started(where))
        request = RunRequest.of(
            out, options, data_dir, source, init, resume, execution, loading, tensorboard
        )
        return _run(request, where, ranks, until_the_end)


def finished(out: Path, options: Mapping[str, Any], source: Path | None = None) -> bool:
    """Return whether a folder holds a run with these options that has written its model.

    Raises:
        ValueError: the folder holds a run, but with other options or from another source.
    """
    if not (out / checkpoint.INDEX).exists():
        return False
    saved = saved_run(out, options, source)
    done = saved.epoch == saved.config["epochs"]
    return done and all((out / name).is_file() for name in (REPORT, FILE))


def _run(
    request: RunRequest,
    device: torch.device,
    ranks: Ranks,
    until_the_end: contextlib.ExitStack,
) -> ModelComparison | None:
    """Do what `run` says. Nothing is written before everything that can be checked is."""
    setup = RunSetup.of(request, device, ranks, until_the_end)
    try:
        images = TrainingImages.of(setup)
        trained = TrainedModel.of(setup, images)
        backend = trained.backend_of_a_step(setup, images)
        record = RunRecord(setup, images, trained, backend)
        record.begin(until_the_end)
        _train_epochs(setup, images, trained, record)
        images.looked.say_unreadable()
        return _report(images, trained, record)
    except KeyboardInterrupt:
        epoch = epoch_of(setup.folder)
        found = "no checkpoint yet"
        if epoch is not None:
            found = f"epoch {epoch} of {setup.config.epochs}; --resume goes on from there"
        raise KeyboardInterrupt(f"{setup.folder} holds {found}") from None


def _train_epochs(
    setup: RunSetup, images: TrainingImages, trained: TrainedModel, record: RunRecord
) -> None:
    """Train for the epochs that are left, and test and record each."""
    config, plan, normalise = images.config, images.plan, images.normalise

    def after_epoch(result: EpochResult) -> str:
        when = f" after epoch {result.epoch}"
        ranks = setup.execution.ranks
        tested = evaluated(trained.final, images.data, normalise, config.dtype, ranks, when)
        row = {
            "epoch": result.epoch,
            "train_loss": result.loss,
            "train_accuracy": result.accuracy,
            "test_accuracy": tested.accuracy,
            record.columns[WORK]: tested.work,
            "images_per_second": result.images_per_second,
            "learning_rate": result.learning_rate,
            **({} if result.imbalance is None else result.imbalance.metrics()),
        }
        record.add(row)
        return "; ".join((epoch_line(row, plan.epochs), *result.remarks()))

    with images.looked.loader(config, plan, normalise, setup.loading, setup.device) as loader:
        train(
            trained.model,
            images.data,
            plan,
            normalise,
            config.augmentation(),
            optimizer=trained.optimizer,
            averaged=trained.averaged,
            epochs_done=len(record.history),
            title=f"training on {config.data}",
            after_epoch=after_epoch,
            execution=setup.execution,
            loader=loader,
            rows=trained.rows,
        )


def _report(
    images: TrainingImages, trained: TrainedModel, record: RunRecord
) -> ModelComparison | None:
    """Write the report, and say which epoch was best; do nothing on ranks that do not write."""
    final = cast(ImageClassifier, whole_model(trained.final))
    if record.writing is None:
        return None
    found = write_report(
        record.writing,
        final,
        images.data,
        images.normalise,
        record.entries(),
        rounds=ROUNDS,
        dtype=images.config.dtype,
    )
    record.end()
    return found
