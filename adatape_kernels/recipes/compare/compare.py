"""The command `compare`: all runs are trained, each is kept, and then they are measured in turn."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adatape_kernels.data.printable import printable
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.compare.compare_calibration import calibrated
from adatape_kernels.recipes.compare.compare_config import CompareConfig
from adatape_kernels.recipes.compare.compare_folder import (
    PICTURE,
    TABLE,
    options_of,
    saved_plan,
    saved_results,
    saved_run,
    write_plan,
)
from adatape_kernels.recipes.compare.compare_picture import drawn
from adatape_kernels.recipes.compare.compare_plan import amount_text, time_split_text
from adatape_kernels.recipes.compare.compare_report import picture_title, report_of
from adatape_kernels.recipes.compare.compare_result import CompareResult
from adatape_kernels.recipes.compare.compare_runs import trained_and_measured
from adatape_kernels.recipes.compare.compare_table import table
from adatape_kernels.recipes.compare.compare_work import CompareWork
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.rank_workers import runs_at_a_time, runs_dealt_out
from adatape_kernels.recipes.one_thread import one_thread
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import check_empty_folder, claim, folder_argument
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.option_checks import option_name


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
        compared = CompareWork.of(config, where, jobs, backends, place, reading)
        return _run(compared, folder, started)


def _run(work: CompareWork, folder: Path, started: float) -> list[CompareResult]:
    """Do what the folder lacks."""
    saved = saved_plan(folder, work.config, work.facts)
    if saved is None:
        check_empty_folder(folder)
    print(work.line())
    plan, costs = saved or calibrated(work, started)
    print(amount_text(work.config, plan, len(work.data.train_labels)))
    if saved is None:
        print(time_split_text(plan, time.monotonic() - started))
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder) as out:
        if saved is None:
            check_empty_folder(folder)
            write_plan(out, work.config, work.facts, plan, costs)
        whole = all(saved_run(folder, run) is not None for run in work.runs)
        results = saved_results(folder, work.config) if whole else None
        if results is None:
            results = trained_and_measured(work, out, plan, costs)
            report = report_of(work, plan, results, time.monotonic() - started)
            out.write(REPORT, json_bytes(report))
        out.write(TABLE, f"{table(results)}\n".encode())
        out.write(PICTURE, drawn(results, picture_title(work.config, plan)))
    print(f"\n{table(results)}\n")
    print(f"{printable(folder)}{os.sep}: {REPORT}, {TABLE}, {PICTURE} and the models")
    return results
