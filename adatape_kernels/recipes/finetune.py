"""What a tape adds to a pretrained ViT: it is fine-tuned without one and with one, side by side.

Every run is one of `train`, in a folder of its own: the source where none is given, a plain ViT
that reads nothing; and from that source, for each seed, one run of each kind of `finetune_report`,
with the same images, epochs and learning rates.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from adatape_kernels.arguments import check_kind, check_path, shown
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
from adatape_kernels.recipes.finetune_report import KINDS, FinetuneReport, report
from adatape_kernels.recipes.output_folder import check_output_folder, check_run_folder
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder, claim, folder_argument, leftovers
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading, with_draws
from adatape_kernels.recipes.training.run_loader import LookedAt
from adatape_kernels.recipes.training.source_file import SourceFile, timm_tensors
from adatape_kernels.recipes.training.train_config import TrainConfig, given_options, option_name
from adatape_kernels.recipes.training.training_options import TRAINING_OPTIONS

PLAN = "finetune.json"
"""Name of the file that holds what a comparison was started with."""
SOURCE = "vit.safetensors"
"""Name of the file of a source that was trained here, in timm's names."""
DEFAULT_SEEDS, MOST_SEEDS = 3, 100

# Options of `train` that make the ViT, which a source brings with it.
_OF_THE_VIT = ("variant", "image_size", "patch", "dim", "depth", "heads", "ffn", "activation")
# Options of `train` by which both the source and what is fine-tuned from it are trained.
_OF_BOTH = (
    *("data", "limit", "batch", "weight_decay", "seed", "dtype", *TRAINING_OPTIONS),
    *("unreadable", "unreadable_limit"),
)


class _How(NamedTuple):
    """Where and how all runs are computed."""

    device: torch.device
    execution: Mapping[str, Any]
    loading: Mapping[str, Any]
    ranks: Ranks


@dataclass(frozen=True)
class FinetunePlan:
    """What a comparison was started with, as its folder keeps it."""

    options: dict[str, Any]
    """Options of `train` that were given."""
    data_dir: str | None
    source: str | None
    """The file of the source; None for one that is trained here."""
    source_epochs: int | None
    seeds: int
    execution: dict[str, Any] = field(default_factory=dict)
    """What was asked for of how steps are computed, by field of Execution."""
    loading: dict[str, Any] = field(default_factory=dict)
    """What was asked for of how images are read, by field of Loading."""

    def source_options(self) -> dict[str, Any]:
        """Return the options of the run that trains the source."""
        names = (*_OF_BOTH, *_OF_THE_VIT)
        given = {name: self.options[name] for name in names if name in self.options}
        own = {"num_tape_tokens": 0, "epochs": self.source_epochs, "activation": "gelu"}
        return {**own, **given, "split_seed": self._split()}

    def kind_options(self, kind: str, number: int) -> dict[str, Any]:
        """Return the options of one run that begins with the source."""
        options = {**self.options, **KINDS[kind]}
        if self.source is None:  # all but two of the ViT's are in its file
            made = TrainConfig.of(self.source_options())
            vit = made.vit_config(num_classes=1, in_channels=3)
            options = {name: v for name, v in options.items() if name not in _OF_THE_VIT}
            options |= {"heads": vit.num_heads, "activation": vit.activation}
        seed = self.options.get("seed", 0) + number
        return {**options, "seed": seed, "split_seed": self._split()}

    def _split(self) -> int:
        """Return the seed of the split, which all runs have in common."""
        return self.options.get("split_seed", self.options.get("seed", 0))

    def check(self) -> None:
        """Raise ValueError where options are wrong, before any training."""
        self.check_execution()
        bank = self.options.get("bank")
        if bank is not None:
            raise ValueError(f"bank: expected none, as both kinds are compared, got {shown(bank)}")
        recipe = self.options.get("recipe")
        if recipe is not None:
            raise ValueError(f"recipe: expected none for a fine-tuning, got {shown(recipe)}")
        model = self.options.get("model_name", "adatape")
        if model != "adatape":
            raise ValueError(f"model: expected adatape, which is compared, got {shown(model)}")
        if self.options.get("num_tape_tokens") == 0:
            raise ValueError("num-tape-tokens: expected 1 or more, as the control has none, got 0")
        last = self.options.get("seed", 0) + self.seeds - 1
        if self.source is None:
            self._check_run(self.source_options())
            for kind in KINDS:
                self._check_run({**self.options, **KINDS[kind], "seed": last})
        else:
            if self.source_epochs is not None:
                raise ValueError(
                    f"source-epochs: expected none with a source, got {self.source_epochs}"
                )
            start = _read_source(Path(self.source), self.options)
            for kind in KINDS:
                self._check_run(self.kind_options(kind, self.seeds - 1), start)

    def _check_run(self, options: Mapping[str, Any], start: SourceFile | None = None) -> None:
        """Raise ValueError where `train` would refuse a run's options."""
        config = TrainConfig.of(with_draws(options, self.loading), start)
        Loading.of_run(self.loading).check_options(config)

    def check_execution(self) -> None:
        """Raise ValueError where a run could not be computed as was asked for."""
        drawn = self.options.get("halt_threshold_range")
        Execution.of_run("float32", self.execution).check_thresholds(drawn)

    def check_data(self) -> None:
        """Refuse an image set that cannot be read, before anything is written.

        Raises:
            ValueError: it cannot.
            RuntimeError: a package that an option needs is not installed.
        """
        if self.source is None:
            config = TrainConfig.of(self.source_options())
        else:
            start = _read_source(Path(self.source), self.options)
            config = TrainConfig.of(self.kind_options("plain", 0), start)
        config.require_packages()
        load(config.data, self.data_dir, image_size=config.image_size, seed=config.split)


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
        resume = resume or goes_on(folder / PLAN, ranks)
        plan_of = _saved_plan if resume else _new_plan
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


def _new_plan(folder: Path, given: dict[str, Any]) -> FinetunePlan:
    """Return what to do, once all is checked that can be before training. Raises ValueError."""
    check_output_folder(folder)
    names = {inner.name for inner in folder.iterdir()} if folder.exists() else set()
    found = min(names - leftovers(folder), default=None)
    if found is not None:
        hint = ", or --resume" if PLAN in names else ""
        raise ValueError(
            f"out: expected a new or empty folder{hint}, got {printable(folder)}, "
            f"which holds {printable(PLAN if PLAN in names else found)}"
        )
    plan = FinetunePlan(**{**given, "seeds": given["seeds"] or DEFAULT_SEEDS})
    plan.check()
    plan.check_data()
    return plan


def _saved_plan(folder: Path, given: Mapping[str, Any]) -> FinetunePlan:
    """Return the plan that a folder holds.

    Raises:
        ValueError: there is none, or something that is given is not as in it.
    """
    check_run_folder(folder)
    file = folder / PLAN
    try:
        saved = json.loads(file.read_bytes())
        plan = FinetunePlan(**saved)
        check_kind("execution", plan.execution, Mapping)
        check_kind("loading", plan.loading, Mapping)
        as_integer("seeds", plan.seeds, 1, MOST_SEEDS)
        plan.check()
    except FileNotFoundError:
        raise ValueError(f"resume: expected {printable(file)}, got no such file") from None
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{printable(file)}: expected the plan of a comparison, got {printable(error, 200)}"
        ) from None
    pairs = [(name, given[name], saved[name]) for name in ("source", "source_epochs", "seeds")]
    before_by_name = given_options(plan.options)  # as JSON has no tuples
    for name, value in given["options"].items():
        pairs.append((name, value, before_by_name.get(name)))
    for name, value, before in pairs:
        if value is not None and value != before:
            raise ValueError(
                f"{option_name(name)}: expected {shown(before)}, as in {printable(file)}, "
                f"got {shown(value)}"
            )
    plan = replace(
        plan,
        data_dir=given["data_dir"] or plan.data_dir,
        execution={**plan.execution, **given["execution"]},
        loading={**plan.loading, **given["loading"]},
    )
    plan.check()
    return plan


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
    start = _read_source(file, plan.kind_options("plain", 0))
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


def _read_source(file: Path, options: Mapping[str, Any]) -> SourceFile:
    return SourceFile.read(file, heads=options.get("heads"), activation=options.get("activation"))
