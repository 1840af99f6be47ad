"""What a tape adds to a pretrained ViT: it is fine-tuned without one and with one, side by side.

Every run is one of `train`, in a folder of its own: the source where none is given, a plain ViT
that reads nothing; and from that source, for each seed, one run of each kind of `finetune_report`,
with the same images, epochs and learning rates.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from adatape_kernels.arguments import check_kind, check_path
from adatape_kernels.data import load
from adatape_kernels.data.loading import decoded_ahead
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeViTConfig
from adatape_kernels.models.value_checks import as_flag, as_integer
from adatape_kernels.recipes import checkpoint, model_loading, pictures
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.begun_runs import goes_on, note_begun
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.finetune.finetune_folder import (
    MOST_SEEDS,
    PLAN,
    SOURCE,
    new_plan,
    saved_plan,
)
from adatape_kernels.recipes.finetune.finetune_plan import FinetunePlan, read_source
from adatape_kernels.recipes.finetune.finetune_report import KINDS, FinetuneReport, report
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder, claim, folder_argument
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.training.option_checks import given_options, option_name
from adatape_kernels.recipes.training.run_loader import LookedAt
from adatape_kernels.recipes.training.source_file import timm_tensors
from adatape_kernels.recipes.training.train_config import TrainConfig


class _How(NamedTuple):
    """Where and how all runs are computed."""

    device: torch.device
    execution: Mapping[str, Any]
    loading: Mapping[str, Any]
    ranks: Ranks


def run(
    out: str | Path,
    options: Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    source: str | Path | None = None,
    source_epochs: int | None = None,
    seeds: int | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    execution: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
) -> FinetuneReport | None:
    """Fine-tune a ViT without and with tapes, or go on with that, and write report.json into `out`.

    Under torchrun the processes share each step of each run, as in `train.run`.

    Args:
        out: a new or empty folder, or one that holds a comparison to resume.
        options: values by field of `train`'s TrainConfig; absent or None where the default is
            wanted, or on resume what the comparison was started with. Epochs and learning rate are
            those of the fine-tuning; seed is the first of the seeds.
        data_dir: the image set's folder, as in `data.load`; on resume None is where it was.
        source: a safetensors file of a ViT of timm or torchvision, with which options must hold
            heads; None to train one first, of the sizes in options.
        source_epochs: epochs of the source that is trained here; None for the image set's default.
        seeds: how often each kind is fine-tuned, with seeds that follow one another; None for 3.
        resume: go on; runs that are done are not repeated.
        device: where to compute, as `devices.chosen_device` has it.
        execution: how steps are computed, as `train.run` has it.
        loading: how images are read, as `train.run` has it.

    Returns:
        What the report says; None on other ranks than rank 0.

    Raises:
        ValueError: an option, the image set, the source or a checkpoint is not what was expected.
        RuntimeError: a package is missing, or a loss is not finite.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: the comparison was interrupted; the message says how far it has come.
    """
    where = chosen_device(device)
    folder = folder_argument("out", out)
    check_kind("options", options, Mapping)
    asked = {} if execution is None else execution
    check_kind("execution", asked, Mapping)
    read = {} if loading is None else loading
    check_kind("loading", read, Mapping)
    entries = Execution.of_run("float32", asked).entries()
    Loading.of_run(read)
    as_flag("resume", resume)
    pictures.require("finetune")
    given: dict[str, Any] = {
        "options": given_options(options),
        "data_dir": None if data_dir is None else _whole(folder_argument("data-dir", data_dir)),
        "source": None if source is None else _whole(check_path("source", source)),
        "source_epochs": source_epochs,
        "seeds": None if seeds is None else as_integer("seeds", seeds, 1, MOST_SEEDS),
        "execution": {n: entries[n] for n, value in asked.items() if value is not None},
        "loading": {name: value for name, value in read.items() if value is not None},
    }
    with lenient_output(), contextlib.ExitStack() as until_the_end:
        ranks = until_the_end.enter_context(started(where))
        ranks.check_agreement(_by_option(given))
        resume = resume or goes_on(folder / PLAN, ranks)
        plan_of = saved_plan if resume else new_plan
        plan = ranks.of_first(lambda: plan_of(folder, given))
        Execution.of_run("float32", plan.execution).check_device(where)
        own = None
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            own = until_the_end.enter_context(claim(folder))
            note_begun(folder)
            # What is given when a comparison goes on counts for its runs that are not begun yet.
            own.write(PLAN, json_bytes(vars(plan)))
        return _run(folder, own, plan, _How(where, plan.execution, plan.loading, ranks))


def _whole(path: Path) -> str:
    """Return a path by which the same file is found from any folder."""
    return str(path.resolve())


def _by_option(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked for of all ranks alike; the places of files may differ."""
    values = {**given["options"], **given["execution"]}
    values |= {name: given[name] for name in ("source_epochs", "seeds")}
    return {option_name(name): value for name, value in values.items()}


def _run(
    folder: Path, own: RunFolder | None, plan: FinetunePlan, how: _How
) -> FinetuneReport | None:
    """Do what is not done yet, and write the report.

    Args:
        folder: that of the comparison.
        own: what writes into it, on rank 0; None on the others.
        plan: what is to be done.
        how: where and how.
    """
    file = folder / SOURCE if plan.source is None else Path(plan.source)
    runs = {kind: [folder / f"{kind}-{number}" for number in range(plan.seeds)] for kind in KINDS}
    try:
        if plan.source is None:
            made = folder / "source"
            _train(made, plan.source_options(), plan.data_dir, None, how)
            if own is not None and not file.exists():
                _write_source(own, made)
            how.ranks.of_first(lambda: None)  # the others wait until the file is there
        for number in range(plan.seeds):
            for kind, folders in runs.items():
                options = plan.kind_options(kind, number)
                _train(folders[number], options, plan.data_dir, file, how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{folder} holds what is done; --resume goes on from there"
        ) from None
    return None if own is None else _report(own, plan, how, file, runs)


def _report(
    own: RunFolder,
    plan: FinetunePlan,
    how: _How,
    file: Path,
    runs: Mapping[str, Sequence[Path]],
) -> FinetuneReport:
    """Write the report of runs that are done.

    Args:
        own: what writes into the comparison's folder.
        plan: what was to be done.
        how: where and how.
        file: the source.
        runs: the folders of the runs of each kind.
    """
    configs = [TrainConfig.of_saved(checkpoint.load(runs[kind][0]).config) for kind in KINDS]
    one = configs[0]
    loading = Loading.of_run(plan.loading)
    data = load(one.data, plan.data_dir, image_size=one.image_size, seed=one.split)
    looked = replace(loading, look="none" if one.unreadable == "stop" else "test")
    data = LookedAt.of(data, one, looked).data
    data = replace(data, test_images=decoded_ahead(data.test_images, loading.workers))
    start = read_source(file, plan.kind_options("plain", 0))
    vits = {
        kind: cast(AdaTapeViTConfig, config.vit_config(data.num_classes, start.config.in_channels))
        for kind, config in zip(KINDS, configs, strict=True)
    }
    found = report(start, data, vits, runs, how.device, one.dtype)
    entries = {**found.entries(), "plan": vars(plan), "source_sha256": start.facts.sha256}
    own.write(REPORT, json_bytes(entries))
    print(found.table())
    print(f"runs and report: {printable(own.folder)}{os.sep}")
    return found


def _train(
    out: Path, options: Mapping[str, Any], data_dir: str | None, source: Path | None, how: _How
) -> None:
    """Bring one run to its end, from wherever it is."""
    # Rank 0 is about to write what all would look at.
    if how.ranks.of_first(lambda: train.finished(out, options, source)):
        return
    print(f"\n{printable(out)}:")
    resume = how.ranks.of_first(lambda: (out / checkpoint.INDEX).exists())
    train.run(
        out,
        options,
        data_dir=data_dir,
        source=source,
        resume=resume,
        device=how.device,
        execution=how.execution,
        loading=how.loading,
    )


def _write_source(out: RunFolder, made: Path) -> None:
    """Write the ViT of a finished run as timm would."""
    import safetensors.torch

    model: Any = model_loading.load(made)
    out.write(SOURCE, safetensors.torch.save(timm_tensors(model), {"format": "pt"}))
