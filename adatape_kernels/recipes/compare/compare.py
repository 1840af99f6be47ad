"""The command `compare`: all runs are trained, each is kept, and then they are measured in turn."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adatape_kernels.data.loading import decoded_ahead
from adatape_kernels.data.printable import printable
from adatape_kernels.models import ImageClassifier
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.compare.compare_config import CompareConfig, CompareRun, time_text
from adatape_kernels.recipes.compare.compare_folder import (
    PICTURE,
    TABLE,
    options_of,
    saved_plan,
    saved_results,
    saved_run,
    write_plan,
    write_run,
)
from adatape_kernels.recipes.compare.compare_measuring import (
    first_batch,
    measured,
    seconds_by_image,
    timed,
)
from adatape_kernels.recipes.compare.compare_picture import drawn
from adatape_kernels.recipes.compare.compare_plan import (
    COUNTING_PASSES,
    ComparePlan,
    Costs,
    RunCost,
    amount_text,
    longest_first,
    planned,
    time_split_text,
)
from adatape_kernels.recipes.compare.compare_progress import COUNT_FORM, FORM, CompareProgress
from adatape_kernels.recipes.compare.compare_result import (
    COSTS,
    CompareResult,
    grouped,
    pareto_front,
)
from adatape_kernels.recipes.compare.compare_table import table
from adatape_kernels.recipes.compare.compare_training import (
    StepTime,
    TimingTask,
    Trained,
    Training,
    TrainProgress,
    TrainTask,
    looked_at,
    new_model,
    work,
)
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.rank_workers import (
    device_of_each,
    runs_at_a_time,
    runs_dealt_out,
)
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.one_thread import one_thread
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import (
    RunFolder,
    check_empty_folder,
    claim,
    folder_argument,
)
from adatape_kernels.recipes.run_images import normaliser_of
from adatape_kernels.recipes.table_bars import TableBars
from adatape_kernels.recipes.terminal import lenient_output, say
from adatape_kernels.recipes.training.data_fingerprint import data_facts
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.training.train_config import option_name
from adatape_kernels.recipes.worker_processes import in_processes

# Share of the budget, and seconds for a model and a size, in which training steps are timed.
_TIMING_SHARE, _LEAST_TIMING, _MOST_TIMING = 0.03, 0.2, 3.0


def run(
    out: str | os.PathLike[str],
    config: CompareConfig,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    backends: Sequence[str] = (),
    device: str | torch.device = "auto",
    loading: Mapping[str, Any] | None = None,
) -> list[CompareResult]:
    """Train what is not trained yet, measure all models, and write what came out into `out`.

    report.json, table.md and compare.png are written in the end. Before that plan.json says by what
    all runs are trained, and each run leaves MODEL-SIZE-SEED.json and .safetensors; so a comparison
    that was interrupted goes on where it ended. Training and measuring take one thread each.

    Args:
        out: a new or empty folder, or one that holds a part of this comparison.
        config: what is compared, and how long it may take.
        data_dir: the image set's folder, as in `data.load`.
        jobs: number of runs that are trained at a time, each in a process with one thread; None for
            one a core, and for one alone on a GPU. Under torchrun each process takes one at a time.
        backends: the backend that serves the ops where runs are trained, and those that serve what
            it does not; the fastest by default.
        device: where to compute, as `devices.chosen_device` has it.
        loading: how images are read that are files, as `train.run` has it; each run that is trained
            has workers of its own.

    Returns:
        The results of all runs, in their order; none on other ranks than rank 0.

    Raises:
        ValueError: the images are not what was expected, `out` cannot be made or written, it holds
            something else or another comparison, or the budget is too small; the error names it.
        OSError: a file cannot be read or written.
        RuntimeError: a package of the extra `demo` is missing, a loss is not finite, or a process
            was ended; the error names the run.
        KeyboardInterrupt: it was interrupted; the message says how many runs `out` holds.
    """
    started = time.monotonic()
    folder = folder_argument("out", out)
    where = None if data_dir is None else folder_argument("data-dir", data_dir)
    place = chosen_device(device)
    jobs = runs_at_a_time(jobs, place)
    reading = config.loading({} if loading is None else loading)
    pictures.require("compare")
    asked = {"backend": tuple(backends), **options_of(config), **options_of(config)["options"]}
    del asked["options"]
    asked = {option_name(name): value for name, value in asked.items()}
    with lenient_output(), one_thread(), runs_dealt_out(place, asked) as works:
        if not works:
            return []
        check_output_folder(folder)
        comparison = _Comparison(config, where, jobs, backends, place, reading, started)
        return comparison.run(folder)


class _Comparison:
    """A comparison at work."""

    def __init__(
        self,
        config: CompareConfig,
        data_dir: Path | None,
        jobs: int,
        backends: Sequence[str],
        device: torch.device,
        loading: Loading,
        started: float,
    ):
        self.config, self.data_dir = config, data_dir
        self.jobs, self.backends = jobs, backends
        self.device, self.loading, self.started = device, loading, started
        self.runs = [*config.runs()]
        first = config.train_config(self.runs[0], 1, config.limit)
        looked, self.normalise = looked_at(first, data_dir, loading)
        for note in looked.data.notes:
            say(f"adatape-kernels: note: {note}")
        looked.say_unreadable()
        self.facts = data_facts(looked.data, self.normalise, data_dir)
        tested = decoded_ahead(looked.data.test_images, loading.workers)
        self.data = replace(looked.data, test_images=tested)

    def run(self, folder: Path) -> list[CompareResult]:
        """Do what the folder lacks."""
        saved = saved_plan(folder, self.config, self.facts)
        if saved is None:
            check_empty_folder(folder)
        print(self._what())
        plan, costs = saved or self._plan()
        print(amount_text(self.config, plan, len(self.data.train_labels)))
        if saved is None:
            print(time_split_text(plan, self._spent()))
        folder.mkdir(parents=True, exist_ok=True)
        with claim(folder) as out:
            if saved is None:
                check_empty_folder(folder)
                write_plan(out, self.config, self.facts, plan, costs)
            whole = all(saved_run(folder, run) is not None for run in self.runs)
            results = saved_results(folder, self.config) if whole else None
            if results is None:
                results = self._results(out, plan, costs)
                self._write_report(out, plan, results)
            out.write(TABLE, f"{table(results)}\n".encode())
            out.write(PICTURE, drawn(results, self._title(plan)))
        print(f"\n{table(results)}\n")
        print(f"{printable(folder)}{os.sep}: {REPORT}, {TABLE}, {PICTURE} and the models")
        return results

    def _what(self) -> str:
        """Return the line that says what is compared."""
        c, data = self.config, self.data
        parts = [(c.models, "model"), (c.sizes, "size"), (c.seeds, "seed")]
        product = " x ".join(f"{len(p)} {name}{'s' * (len(p) > 1)}" for p, name in parts)
        count = len(self.runs)
        return (
            f"{c.data}: {len(data.train_labels):,} training images, {len(data.test_labels):,} test "
            f"images, {data.num_classes} classes; {product} = {count} run{'s' * (count > 1)}, "
            f"{self.jobs} at a time"
        )

    def _title(self, plan: ComparePlan) -> str:
        seeds, epochs = len(self.config.seeds), plan.epochs
        over = "one seed"
        if seeds > 1:
            over = f"means over {seeds} seeds, thin crosses: their standard deviation"
        return (
            f"{self.config.data}: {epochs} epoch{'s' * (epochs > 1)} of {plan.images:,} training "
            f"images; {over}; beside the marks: layers"
        )

    def _spent(self) -> float:
        return time.monotonic() - self.started

    def _task(self, run: CompareRun, epochs: int, limit: int | None) -> TrainTask:
        config, device = self.config.train_config(run, epochs, limit), device_of_each(self.device)
        return TrainTask(run, config, self.data_dir, device, self.loading)

    def _plan(self) -> tuple[ComparePlan, Costs]:
        """Time some steps of each model and size, and choose how much is trained."""
        c, data = self.config, self.data
        pairs = {(run.model, run.size): run for run in self.runs}
        seconds = _LEAST_TIMING
        if c.budget is not None:
            share = _TIMING_SHARE * c.budget * self.jobs / len(pairs)
            seconds = min(_MOST_TIMING, max(_LEAST_TIMING, share))
        tasks = [
            (run.stem, TimingTask(self._task(run, 1, c.limit), seconds))
            for run in sorted(pairs.values(), key=lambda run: -run.size)
        ]
        train: dict[tuple[str, int], float] = {}
        with TableBars(len(pairs), title="timing training steps", form=COUNT_FORM) as bars:
            for message in in_processes(tasks, work, self.jobs, self.backends):
                assert isinstance(message, StepTime)
                train[message.run.model, message.run.size] = message.seconds
                bars.advance()
        begun = time.monotonic()
        images = first_batch(data, self.normalise)
        loading = (time.monotonic() - begun) / len(images)
        costs = {}
        for key, run in pairs.items():
            model = new_model(c.train_config(run, 1, c.limit), data, self.normalise)
            test = seconds_by_image(model.to(self.device), images)
            costs[key] = RunCost(train[key], test)
        plan = planned(
            c,
            costs,
            images=len(data.train_labels),
            test_images=len(data.test_labels),
            jobs=self.jobs,
            loading=loading,
            spent=self._spent(),
        )
        return plan, costs

    def _results(self, out: RunFolder, plan: ComparePlan, costs: Costs) -> list[CompareResult]:
        """Train the runs that are not there, and measure all."""
        done: dict[CompareRun, Training] = {}
        for run in self.runs:
            if (training := saved_run(out.folder, run)) is not None:
                done[run] = training
        if done:
            print(f"{len(done)} of {len(self.runs)} runs are trained already")
        images = plan.epochs * plan.images
        tests = len(self.data.test_labels)
        # What the bar counts is seconds as they were foreseen, of which `jobs` runs share those of
        # training.
        worth = {run: costs[run.model, run.size].train / self.jobs for run in self.runs}
        test = {run: costs[run.model, run.size].test for run in self.runs}
        measuring = (plan.rounds + COUNTING_PASSES) * tests * sum(test.values())
        total = images * sum(worth.values()) + measuring
        there = images * sum(worth[run] for run in done)
        try:
            with TableBars(total, there, title="compare", form=FORM) as bars:
                progress = CompareProgress(bars, total - there)
                self._train(out, plan, costs, done, worth, bars, progress)
                return self._measure(out, plan, done, test, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{printable(out.folder)} holds {len(done)} of {len(self.runs)} runs; the same "
                "command goes on from there"
            ) from None

    def _train(
        self,
        out: RunFolder,
        plan: ComparePlan,
        costs: Costs,
        done: dict[CompareRun, Training],
        worth: dict[CompareRun, float],
        bars: TableBars,
        progress: CompareProgress,
    ) -> None:
        """Train the runs that are not done, and write each into the folder."""
        left = longest_first((run for run in self.runs if run not in done), costs)
        tasks = [(run.stem, self._task(run, plan.epochs, plan.images)) for run in left]
        counted = dict.fromkeys(left, 0)

        def advance(run: CompareRun, images: int) -> None:
            beside = f"{len(done)} of {len(self.runs)} runs trained"
            progress.advance(worth[run] * (images - counted[run]), beside)
            counted[run] = images

        for message in in_processes(tasks, work, self.jobs, self.backends):
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
        self,
        out: RunFolder,
        plan: ComparePlan,
        done: dict[CompareRun, Training],
        test: dict[CompareRun, float],
        progress: CompareProgress,
    ) -> list[CompareResult]:
        """Measure all models."""
        data, tests = self.data, len(self.data.test_labels)
        models = {run: self._loaded(out.folder, run, plan) for run in self.runs}
        # All were trained with the same one, of the images that were used.
        normalise = normaliser_of(models[self.runs[0]])
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

    def _loaded(self, folder: Path, run: CompareRun, plan: ComparePlan) -> ImageClassifier:
        """Return the model of a run. Raises ValueError where the file is none, or another's."""
        file = folder / f"{run.stem}.safetensors"
        model = load(file, device=self.device)
        options = self.config.train_config(run, plan.epochs, plan.images)
        with torch.device("meta"):
            expected = new_model(options, self.data, self.normalise)
        if not isinstance(model, ImageClassifier) or model.config != expected.config:
            raise ValueError(f"{printable(file)}: expected the model of {run.stem}, got another")
        return model

    def _write_report(
        self, out: RunFolder, plan: ComparePlan, results: list[CompareResult]
    ) -> None:
        groups = grouped(results)
        fronts = {cost: pareto_front(groups, cost) for cost in COSTS}
        report = {
            "results": [result.entries() for result in results],
            "pareto_front": {
                cost: [[group.model, group.size] for group in front]
                for cost, front in fronts.items()
            },
            "adatape_on_front": {
                cost: any(group.is_adatape for group in front) for cost, front in fronts.items()
            },
            "options": options_of(self.config),
            "plan": asdict(plan),
            "data": self.facts,
            "jobs": self.jobs,
            "wall_seconds": self._spent(),
            **environment(self.device),
        }
        out.write(REPORT, json_bytes(report))
