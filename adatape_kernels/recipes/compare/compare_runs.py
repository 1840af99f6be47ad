"""The runs of a comparison: they are trained, each is kept, and then all are measured in turn."""

from pathlib import Path

import torch

from adatape_kernels.data.printable import printable
from adatape_kernels.models import ImageClassifier
from adatape_kernels.recipes.compare.compare_config import CompareRun, time_text
from adatape_kernels.recipes.compare.compare_folder import saved_run, write_run
from adatape_kernels.recipes.compare.compare_measuring import measured, timed
from adatape_kernels.recipes.compare.compare_plan import (
    COUNTING_PASSES,
    ComparePlan,
    Costs,
    longest_first,
)
from adatape_kernels.recipes.compare.compare_progress import FORM, CompareProgress
from adatape_kernels.recipes.compare.compare_result import CompareResult
from adatape_kernels.recipes.compare.compare_training import (
    Trained,
    Training,
    TrainProgress,
    new_model,
)
from adatape_kernels.recipes.compare.compare_work import CompareWork
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.run_folder import RunFolder
from adatape_kernels.recipes.run_images import normaliser_of
from adatape_kernels.recipes.table_bars import TableBars


def trained_and_measured(
    work: CompareWork, out: RunFolder, plan: ComparePlan, costs: Costs
) -> list[CompareResult]:
    """Train the runs that are not there, and measure all.

    Args:
        work: what is compared.
        out: what writes into the folder.
        plan: how much is trained.
        costs: what was foreseen.

    Raises:
        ValueError: a file of the folder is none of ours.
        OSError: a file cannot be written.
        RuntimeError: a loss is not finite, or a process was ended; the error names the run.
        KeyboardInterrupt: it was interrupted; the message says how many runs `out` holds.
    """
    runs = work.runs
    done: dict[CompareRun, Training] = {}
    for run in runs:
        if (training := saved_run(out.folder, run)) is not None:
            done[run] = training
    if done:
        print(f"{len(done)} of {len(runs)} runs are trained already")
    images = plan.epochs * plan.images
    tests = len(work.data.test_labels)
    # What the bar counts is seconds as they were foreseen, of which `jobs` runs share those of
    # training.
    worth = {run: costs[run.model, run.size].train / work.jobs for run in runs}
    test = {run: costs[run.model, run.size].test for run in runs}
    measuring = (plan.rounds + COUNTING_PASSES) * tests * sum(test.values())
    total = images * sum(worth.values()) + measuring
    there = images * sum(worth[run] for run in done)
    try:
        with TableBars(total, there, title="compare", form=FORM) as bars:
            progress = CompareProgress(bars, total - there)
            _train(work, out, plan, costs, done, worth, bars, progress)
            return _measure(work, out, plan, done, test, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{printable(out.folder)} holds {len(done)} of {len(runs)} runs; the same "
            "command goes on from there"
        ) from None


def _train(
    work: CompareWork,
    out: RunFolder,
    plan: ComparePlan,
    costs: Costs,
    done: dict[CompareRun, Training],
    worth: dict[CompareRun, float],
    bars: TableBars,
    progress: CompareProgress,
) -> None:
    """Train the runs that are not done, and write each into the folder."""
    runs = work.runs
    left = longest_first((run for run in runs if run not in done), costs)
    tasks = [(run.stem, work.task(run, plan.epochs, plan.images)) for run in left]
    counted = dict.fromkeys(left, 0)

    def advance(run: CompareRun, images: int) -> None:
        beside = f"{len(done)} of {len(runs)} runs trained"
        progress.advance(worth[run] * (images - counted[run]), beside)
        counted[run] = images

    for message in work.done(tasks):
        if isinstance(message, TrainProgress):
            bars.move(message.run.stem, message.step, message.steps, {"loss": message.loss})
            advance(message.run, message.images)
            continue
        assert isinstance(message, Trained)
        write_run(out, message)
        done[message.run] = training = message.training
        advance(message.run, plan.epochs * plan.images)
        bars.end(
            message.run.stem,
            f"trained in {time_text(training.seconds)}, loss {training.train_loss:.3f}, "
            f"{training.train_accuracy:.1%} of the training images right",
        )


def _measure(
    work: CompareWork,
    out: RunFolder,
    plan: ComparePlan,
    done: dict[CompareRun, Training],
    test: dict[CompareRun, float],
    progress: CompareProgress,
) -> list[CompareResult]:
    """Measure all models."""
    data, tests = work.data, len(work.data.test_labels)
    models = {run: _loaded(work, out.folder, run, plan) for run in work.runs}
    # All were trained with the same one, of the images that were used.
    normalise = normaliser_of(models[work.runs[0]])
    found = {}
    for run, model in models.items():
        found[run] = measured(model, data, normalise)
        progress.advance(COUNTING_PASSES * tests * test[run], "counting what runs")
    each = sum(test.values())
    times = timed(
        models,
        data,
        normalise,
        plan.rounds,
        lambda images: progress.advance(each * images, "timing all models in turn"),
    )
    return [
        CompareResult(
            *run,
            accuracy=found[run].accuracy,
            images_per_second=tests / times[run].median,
            images_per_second_p20_p80=(tests / times[run].p80, tests / times[run].p20),
            flops_per_image=found[run].flops_per_image,
            parameters=sum(p.numel() for p in model.parameters()),
            epochs=plan.epochs,
            train_images=plan.images,
            **done[run]._asdict(),
            mean_rows=found[run].mean_rows,
            mean_tape_tokens=found[run].mean_tape_tokens,
        )
        for run, model in models.items()
    ]


def _loaded(work: CompareWork, folder: Path, run: CompareRun, plan: ComparePlan) -> ImageClassifier:
    """Return the model of a run. Raises ValueError where the file is none, or another's."""
    file = folder / f"{run.stem}.safetensors"
    model = load(file, device=work.device)
    options = work.config.train_config(run, plan.epochs, plan.images)
    with torch.device("meta"):
        expected = new_model(options, work.data, work.normalise)
    if not isinstance(model, ImageClassifier) or model.config != expected.config:
        raise ValueError(f"{printable(file)}: expected the model of {run.stem}, got another")
    return model
