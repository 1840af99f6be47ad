"""What a run writes while it trains: checkpoints, metrics, the best epoch's model, events."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.distributed.begun_runs import note_begun
from adatape_kernels.recipes.distributed.divided_checkpoint import (
    check_folder_of_all,
    save_together,
)
from adatape_kernels.recipes.distributed.divided_parameters import is_part, whole
from adatape_kernels.recipes.model_tensors import evaluated_weights
from adatape_kernels.recipes.options_text import options_text
from adatape_kernels.recipes.run_environment import note_differences, run_environment
from adatape_kernels.recipes.run_folder import RunFolder, claim
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.best_model import BEST, best_content, best_entry
from adatape_kernels.recipes.training.data_fingerprint import (
    check_facts,
    data_facts,
    facts_of_ranks,
)
from adatape_kernels.recipes.training.epoch_metrics import columns_of, metrics_csv
from adatape_kernels.recipes.training.run_options import CONFIG, run_options
from adatape_kernels.recipes.training.run_setup import (
    RunSetup,
    TrainingImages,
    refuse_to_overwrite,
)
from adatape_kernels.recipes.training.saved_run import note_extension
from adatape_kernels.recipes.training.source_file import sha256_of
from adatape_kernels.recipes.training.tensorboard_events import TensorBoardEvents
from adatape_kernels.recipes.training.trained_model import TrainedModel


class RunRecord:
    """The epochs that a run has behind it, and the files that say so.

    On ranks that do not write, it keeps the epochs alone.
    """

    def __init__(
        self, setup: RunSetup, images: TrainingImages, trained: TrainedModel, backend: str
    ):
        """Take what a checkpoint holds, if there is one. Nothing is written yet.

        Raises:
            ValueError: the images, or the tensors, are not those that the run began with.
        """
        saved, data_dir = setup.saved, setup.data_dir
        root = None if data_dir is None else Path(data_dir)
        self.facts = data_facts(images.data, images.normalise, root)
        self.environment = run_environment(data_dir, backend, setup.device, setup.execution)
        self.history: list[dict[str, Any]] = []
        self._extended: list[Any] = []
        self._best: dict[str, Any] | None = None
        if saved is not None:
            check_facts(setup.folder, saved, self.facts, images.steps_per_epoch)
            trained.restore(setup.folder, saved)
            self.history, self._extended, self._best = saved.history, saved.extended, saved.best
            note_differences(saved.environment, self.environment)
            if setup.extended:
                note_extension(saved)
        self.environment |= setup.loading.entries()
        self.config = asdict(images.config)
        self._config = images.config
        self.columns = columns_of(images.config)
        self.writing: RunFolder | None = setup.claimed
        self._setup, self._trained = setup, trained
        self._steps = images.steps_per_epoch
        self._description = trained.description(images)
        self._events: TensorBoardEvents | None = None

    def begin(self, until_the_end: contextlib.ExitStack) -> None:
        """Make and claim the folder of a new run, and write what is to be there before training.

        Raises:
            ValueError: the ranks have found other images than each other, or with fsdp other
                folders, or the folder is in use.
            OSError: a file cannot be written.
        """
        setup = self._setup
        folder, ranks, saved = setup.folder, setup.execution.ranks, setup.saved
        ranks.check_agreement(facts_of_ranks(self.facts))
        if self.writing is None and ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            # A folder that cannot be written shows here, before any training.
            self.writing = until_the_end.enter_context(claim(folder))
            refuse_to_overwrite(folder)
        if self.writing is not None:
            note_begun(folder)
        if setup.execution.parallel == "fsdp":
            check_folder_of_all(folder, self.writing, ranks)
        if self.writing is not None:
            checkpoint.remove_leftovers(self.writing)
            if saved is not None:
                self._mend_best(self.writing, saved)
        if saved is None:
            self._save(self.history, self._trained.tensors())
            self._write_options()
        elif setup.extended or self._best != saved.best:
            self._save(self.history, saved.tensors)
        elif self.writing is not None:
            self._write_metrics(self.writing, self.history)
        if setup.tensorboard and self.writing is not None:
            self._events = TensorBoardEvents(folder, self.history)
            until_the_end.callback(self._events.close)

    def add(self, row: dict[str, Any]) -> None:
        """Write the checkpoint of an epoch, and then that the epoch is done."""
        try:
            # Events behind the last checkpoint are purged when the run goes on; missing ones would
            # be missing for good.
            if self._events is not None:
                self._events.add(row)
        finally:
            # Where parameters are shared out among ranks, all of them bring them here.
            self._save([*self.history, row], self._trained.tensors())
        self.history.append(row)

    def entries(self) -> dict[str, Any]:
        """Return what report.json holds of the training."""
        entries: dict[str, Any] = {
            "config": self.config,
            "data": self.facts,
            "metrics": self.history,
        }
        if self._extended:
            entries["extended"] = self._extended
        if self._best is not None:
            epoch = self._best["epoch"]
            accuracy = self.history[epoch - 1]["test_accuracy"]
            entries["best"] = {"file": BEST, "epoch": epoch, "test_accuracy": accuracy}
        return entries

    def end(self) -> None:
        """Say which epoch was best, and give TensorBoard the pictures of the report."""
        if self._events is not None:
            self._events.add_pictures(self._setup.folder, len(self.history))
        if self._best is not None:
            epoch = self._best["epoch"]
            print(
                f"best epoch: {epoch} of {len(self.history)}, test accuracy "
                f"{self.history[epoch - 1]['test_accuracy']:.2%}, in {BEST}; it was chosen by the "
                "test images, which flatters it"
            )

    def _save(self, rows: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Write the checkpoint, then the best model where it is this one, then the metrics.

        Where the tensors are divided among ranks, all of them call this together.
        """
        ranks, divided = self._setup.execution.ranks, any(map(is_part, tensors.values()))
        if self.writing is None and not divided:
            return
        is_best = len(rows) > len(self.history) and self._is_best(rows[-1])
        if divided:  # other ranks do not know which epoch was best
            is_best = ranks.of_first(lambda: is_best)
        content, best = None, self._best
        if is_best:
            evaluated = evaluated_weights(tensors)
            weights = {name: whole(each).detach().cpu() for name, each in evaluated.items()}
            content = best_content(weights, self._description)
            since = 1 if best is None else best["since"]
            best = best_entry(len(rows), since, content)
        save_together(
            self._setup.folder,
            self.writing,
            Checkpoint(
                len(rows),
                len(rows) * self._steps,
                self.config,
                self.facts,
                rows,
                self.environment,
                dict(tensors),
                extended=self._extended,
                best=best,
            ),
            ranks,
        )
        if self.writing is None:
            return
        self._best = best
        if content is not None:
            self.writing.write(BEST, content)
        self._write_metrics(self.writing, rows)

    def _is_best(self, row: Mapping[str, Any]) -> bool:
        if self._best is None:
            return True
        return row["test_accuracy"] > self.history[self._best["epoch"] - 1]["test_accuracy"]

    def _write_metrics(self, writing: RunFolder, rows: list[dict[str, Any]]) -> None:
        writing.write("metrics.csv", metrics_csv(rows, self.columns))

    def _write_options(self) -> None:
        """Write the file with which `train --config` trains the same run again."""
        setup = self._setup
        if self.writing is not None:
            given = (setup.start, setup.data_dir, setup.execution, setup.loading)
            content = options_text(run_options(self._config, *given))
            self.writing.write(CONFIG, content.encode())

    def _mend_best(self, writing: RunFolder, saved: Checkpoint) -> None:
        """Write the best model anew where its file is not the one that the checkpoint names.

        That is so where the run was killed between the two: the checkpoint is then that of the
        best epoch. Otherwise the file is lost, or an earlier version has written none, and epochs
        are compared from the checkpoint's on.
        """
        done, file = len(self.history), writing.folder / BEST
        if not done:
            return
        known = self._best
        if known is not None and file.is_file() and sha256_of(file) == known["sha256"]:
            return
        since = done
        if known is not None and known["epoch"] == done:
            since = known["since"]
        elif known is not None:
            say(
                f"adatape-kernels: note: {BEST} is not that of epoch {known['epoch']}, which was "
                f"best; the best is now looked for from epoch {done} on"
            )
        content = best_content(evaluated_weights(saved.tensors), self._description)
        writing.write(BEST, content)
        self._best = best_entry(done, since, content)
