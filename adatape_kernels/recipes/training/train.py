"""Training on an image set from local files, with checkpoints and a report."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from adatape_kernels.arguments import check_kind, check_path, shown
from adatape_kernels.data import ImageSet, Normaliser, load
from adatape_kernels.data.image_set import Subset, unit_range
from adatape_kernels.data.printable import printable
from adatape_kernels.models import ImageClassifier
from adatape_kernels.models.model_file import FILE
from adatape_kernels.models.value_checks import as_flag
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.devices import chosen_device, moved
from adatape_kernels.recipes.distributed.dealing import rows_tensors, saved_rows
from adatape_kernels.recipes.distributed.divided_checkpoint import save_together
from adatape_kernels.recipes.distributed.divided_parameters import whole_model
from adatape_kernels.recipes.distributed.ranks import Ranks, started
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.machine import attention_backend
from adatape_kernels.recipes.model_comparison import ModelComparison
from adatape_kernels.recipes.model_report import write_report
from adatape_kernels.recipes.output_folder import check_output_folder, check_run_folder
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.run_environment import note_differences, run_environment
from adatape_kernels.recipes.run_folder import check_empty_folder, claim, folder_argument
from adatape_kernels.recipes.run_images import folder_of_images
from adatape_kernels.recipes.terminal import lenient_output, say
from adatape_kernels.recipes.training.averaged_model import averaged_model, evaluated_model
from adatape_kernels.recipes.training.data_fingerprint import check_facts, data_facts
from adatape_kernels.recipes.training.deterministic_mode import repeatable
from adatape_kernels.recipes.training.epoch_metrics import (
    WORK,
    check_history,
    columns_of,
    epoch_line,
    metrics_csv,
)
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading, with_draws
from adatape_kernels.recipes.training.run_loader import LookedAt
from adatape_kernels.recipes.training.source_file import SourceFile, sha256_of
from adatape_kernels.recipes.training.train_config import (
    TrainConfig,
    check_option,
    option_name,
    with_present_names,
)
from adatape_kernels.recipes.training.train_loop import EpochResult, predict, train
from adatape_kernels.recipes.training.train_plan import TrainPlan

ROUNDS = 7
"""Number of times that the report repeats each timing."""


def run(
    out: str | Path,
    options: Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    source: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    execution: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
) -> ModelComparison | None:
    """Train, or go on with a run, and write its report into `out`.

    Under torchrun the processes share each step, and rank 0 writes what is written. Where torchrun
    has started them anew, the run goes on from its last checkpoint.

    After each epoch checkpoint.json, the safetensors file that it names and metrics.csv, which has
    a row for each epoch, are written into `out`; in the end report.json, model.safetensors and the
    pictures, as the demo writes them.

    Args:
        out: a new or empty folder, or one that holds a run to resume.
        options: values by field of TrainConfig; absent or None where the default is wanted, or on
            resume what the run was started with.
        data_dir: the image set's folder, as in `data.load`; on resume None is where it was.
        source: a safetensors file with the parameters of a ViT of timm or torchvision, to begin
            with; None for a new model. A run that is resumed no longer needs it.
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
        asked = {} if execution is None else execution
        read = {} if loading is None else loading
        ranks = until_the_end.enter_context(started(where))
        return _run(
            out, options, data_dir, source, resume, where, asked, read, ranks, until_the_end
        )


def finished(out: Path, options: Mapping[str, Any], source: Path | None = None) -> bool:
    """Return whether a folder holds a run with these options that has written its model.

    Raises:
        ValueError: the folder holds a run, but with other options or from another source.
    """
    if not (out / checkpoint.INDEX).exists():
        return False
    saved = _saved(out, options, source)
    done = saved.epoch == saved.config["epochs"]
    return done and all((out / name).is_file() for name in (REPORT, FILE))


def _run(
    out: str | Path,
    options: Mapping[str, Any],
    data_dir: str | Path | None,
    source: str | Path | None,
    resume: bool,
    device: torch.device,
    asked: Mapping[str, Any],
    read: Mapping[str, Any],
    ranks: Ranks,
    until_the_end: contextlib.ExitStack,
) -> ModelComparison | None:
    """Do what `run` says. Nothing is written before everything that can be checked is."""
    folder = folder_argument("out", out)
    check_kind("options", options, Mapping)
    check_kind("execution", asked, Mapping)
    check_kind("loading", read, Mapping)
    as_flag("resume", resume)
    if data_dir is not None:
        folder_argument("data-dir", data_dir)
    file = None if source is None else check_path("source", source)
    pictures.require("train")
    resume = resume or (ranks.restarts > 0 and (folder / checkpoint.INDEX).exists())
    if resume:
        check_run_folder(folder)
    elif ranks.leads:  # others would make the folder and take it back at the same time
        check_output_folder(folder)
    run_folder, saved, start = None, None, None
    if resume:
        checkpoint.require(folder)
        # Another process may be about to write the next checkpoint, until the folder is ours.
        if ranks.leads:
            run_folder = until_the_end.enter_context(claim(folder))
        saved = _saved(folder, options, file)
        config = TrainConfig.of_saved(saved.config)
        data_dir = data_dir or folder_of_images(folder, saved)
    else:
        if ranks.leads:
            _refuse_to_overwrite(folder)
        if file is not None:
            start = SourceFile.read(
                file, heads=options.get("heads"), activation=options.get("activation")
            )
        config = TrainConfig.of(with_draws(options, read), start)
    before = None if saved is None else saved.environment
    execution = replace(Execution.of_run(config.dtype, asked, before), ranks=ranks)
    loading = Loading.of_run(read, before)
    loading.check_options(config)
    execution.check_thresholds(config.halt_threshold_range)
    config.require_packages()
    data = load(config.data, data_dir, image_size=config.image_size, seed=config.split)
    if config.limit is not None:
        data = data.limited(config.limit, config.split)
    for note in data.notes:
        say(f"adatape-kernels: note: {note}")
    chosen = config.batch is None
    config.with_batch_for(len(data.train_labels))  # raises before any image is decoded
    looked = LookedAt.of(data, config, loading, ranks)
    data = looked.data
    config = config.with_batch_for(len(data.train_labels))
    plan = config.plan()
    print(_plan_line(data, plan, chosen))
    normalise = Normaliser.of(looked.sample)
    torch.manual_seed(config.seed)
    # Parameters are drawn on the CPU, so that a seed gives the same ones on every device.
    model = config.model(data.num_classes, len(normalise.mean), start).to(device)
    execution.check_model(model)
    optimizer = plan.optimizer(model)
    averaged = averaged_model(model, config.ema) if config.ema else None
    final = evaluated_model(model, averaged)
    # A compiler makes graphs for ranges of sizes, and should make that of the batches here.
    tried = -(-plan.batch // execution.accumulate) if execution.compiled else 2
    first = Subset(looked.sample, torch.arange(min(tried, len(looked.sample))))
    pixels = normalise(unit_range(first[torch.arange(len(first))]))
    with repeatable():  # as in training, since a compiled graph is one of its mode
        execution.try_step(model, moved(pixels, device))
    backend = attention_backend(lambda: predict(model, first, normalise))
    facts = data_facts(data, normalise, None if data_dir is None else Path(data_dir))
    environment = run_environment(data_dir, backend, device, execution)
    steps = plan.steps_per_epoch(len(data.train_labels))
    history: list[dict[str, Any]] = []
    columns = columns_of(config)
    before_tensors = {} if saved is None else saved.tensors
    image_rows = saved_rows(folder / checkpoint.INDEX, before_tensors, len(data.train_labels))
    if saved is not None:
        check_facts(folder, saved, facts, steps)
        checkpoint.restore(folder, saved.tensors, model, optimizer, averaged)
        history = saved.history
        note_differences(saved.environment, environment)
    environment |= loading.entries()
    ranks.check_agreement("out: epochs", len(history), device)
    if run_folder is None and ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder that cannot be written shows here, before any training.
        run_folder = until_the_end.enter_context(claim(folder))
        _refuse_to_overwrite(folder)
    writing = run_folder

    def save(rows: list[dict[str, Any]]) -> None:
        tensors = checkpoint.tensors_of(model, optimizer, averaged) | rows_tensors(image_rows)
        done = len(rows)
        save_together(
            folder,
            writing,
            Checkpoint(done, done * steps, asdict(config), facts, rows, environment, tensors),
            ranks,
        )
        if writing is not None:
            writing.write("metrics.csv", metrics_csv(rows, columns))

    if writing is not None:
        checkpoint.remove_leftovers(writing)
    if saved is None:
        save(history)
    elif writing is not None:
        writing.write("metrics.csv", metrics_csv(history, columns))

    def after_epoch(result: EpochResult) -> str:
        when = f" after epoch {result.epoch}"
        tested = evaluated(final, data, normalise, config.dtype, ranks, when)
        row = {
            "epoch": result.epoch,
            "train_loss": result.loss,
            "train_accuracy": result.accuracy,
            "test_accuracy": tested.accuracy,
            columns[WORK]: tested.work,
            "images_per_second": result.images_per_second,
            "learning_rate": result.learning_rate,
            **({} if result.imbalance is None else result.imbalance.metrics()),
        }
        save([*history, row])
        history.append(row)
        return "; ".join((epoch_line(row, plan.epochs), *result.remarks()))

    try:
        with looked.loader(config, plan, normalise, loading, device) as loader:
            train(
                model,
                data,
                plan,
                normalise,
                config.augmentation(),
                optimizer=optimizer,
                averaged=averaged,
                epochs_done=len(history),
                title=f"training on {config.data}",
                after_epoch=after_epoch,
                execution=execution,
                loader=loader,
                rows=image_rows,
            )
        looked.say_unreadable()
        whole = cast(ImageClassifier, whole_model(final))
        entries = {"config": asdict(config), "data": facts, "metrics": history}
        if writing is None:
            return None
        return write_report(
            writing, whole, data, normalise, entries, rounds=ROUNDS, dtype=config.dtype
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{folder} holds epoch {len(history)} of {plan.epochs}; --resume goes on from there"
        ) from None


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


def _refuse_to_overwrite(out: Path) -> None:
    """Raise ValueError unless a folder is absent, or empty but for what a killed start has left."""
    if (out / checkpoint.INDEX).exists():
        raise ValueError(f"out: expected a new folder, or --resume, got {out}, which holds a run")
    check_empty_folder(out)


def _saved(out: Path, options: Mapping[str, Any], source: Path | None = None) -> Checkpoint:
    """Load the checkpoint of a run.

    Raises:
        ValueError: no run has written it, or an option or the source is not that of the run.
    """
    saved = checkpoint.load(out)
    file = out / checkpoint.INDEX
    try:
        config = saved.config if saved.format > 1 else with_present_names(saved.config)
        saved = replace(saved, config=asdict(TrainConfig.of_saved(config)))
        check_history(saved.history, saved.config)
        Execution.of_run(saved.config["dtype"], {}, saved.environment)
        Loading.of_run({}, saved.environment)
    except ValueError as error:
        raise ValueError(f"{file}: expected the options of a run, got {error}") from None
    for name, value in options.items():
        if value is None:
            continue
        if name not in saved.config:
            raise ValueError(f"options: expected a field of TrainConfig, got {shown(name)}")
        if check_option(name, value) != saved.config[name]:
            raise ValueError(
                f"{option_name(name)}: expected {saved.config[name]}, as in {file}, got {value}"
            )
    facts = saved.config["source"]
    if source is not None and (facts is None or facts["sha256"] != sha256_of(source)):
        began = "none" if facts is None else f"the file with SHA-256 {facts['sha256'][:16]}…"
        raise ValueError(
            f"source: expected {began}, as in {file}, got {printable(source)}, which is another"
        )
    return saved
