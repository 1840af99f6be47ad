"""A run's checkpoint as `train` goes on from it: its options checked, and its epochs extended."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.best_model import check_best
from adatape_kernels.recipes.training.epoch_metrics import check_history
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.initial_model import file_of
from adatape_kernels.recipes.training.loading_options import Loading
from adatape_kernels.recipes.training.option_checks import check_option, option_name
from adatape_kernels.recipes.training.saved_options import with_present_names
from adatape_kernels.recipes.training.source_file import sha256_of
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import MOST_EPOCHS

_EXTENSION = ("after_epoch", "epochs", "before")


def saved_run(
    out: Path,
    options: Mapping[str, Any],
    source: Path | None = None,
    init: Path | None = None,
    *,
    extend: bool = False,
) -> Checkpoint:
    """Load the checkpoint of a run.

    Args:
        out: the run's folder.
        options: values by field of TrainConfig; absent or None for those of the run.
        source, init: the file that the run is said to have begun with; None for whatever it was.
        extend: whether another number of epochs than the run's extends it, as `extended` does.

    Raises:
        ValueError: no run has written it, or an option or a file is not that of the run.
    """
    saved = checkpoint.load(out)
    file = out / checkpoint.INDEX
    try:
        entries = saved.config if saved.format > 1 else with_present_names(saved.config)
        config = TrainConfig.of_saved(entries)
        saved = replace(saved, config=asdict(config))
        check_history(saved.history, saved.config)
        check_best(saved.best, saved.history)
        _check_extensions(saved.extended, saved.epoch, saved.config["epochs"])
        Execution.of_run(saved.config["dtype"], {}, saved.environment)
        Loading.of_run({}, saved.environment).check_options(config)
    except ValueError as error:
        raise ValueError(f"{file}: expected the options of a run, got {error}") from None
    for name, value in options.items():
        if value is None:
            continue
        if name not in saved.config:
            raise ValueError(f"options: expected a field of TrainConfig, got {shown(name)}")
        checked = check_option(name, value)
        if checked != saved.config[name] and not (extend and name == "epochs"):
            raise ValueError(
                f"{option_name(name)}: expected {saved.config[name]}, as in {file}, got {value}"
            )
    for name, path in (("source", source), ("init", None if init is None else file_of(init))):
        facts = saved.config[name]
        if path is not None and (facts is None or facts["sha256"] != sha256_of(path)):
            began = "none" if facts is None else f"the file with SHA-256 {facts['sha256'][:16]}…"
            raise ValueError(
                f"{name}: expected {began}, as in {file}, got {printable(path)}, which is another"
            )
    return saved


def extended(out: Path, saved: Checkpoint, epochs: int | None) -> Checkpoint:
    """Return a run that goes on to another number of epochs.

    From the next epoch on its learning rate is that of a run with this number of epochs at the same
    step, so that the curve is none of a run that began with it. The checkpoint keeps behind which
    epoch that was.

    Args:
        out: the run's folder, for errors.
        saved: its checkpoint.
        epochs: how many epochs it is to have altogether; None for as many as it was to have.

    Raises:
        ValueError: the run has more behind it.
    """
    before = saved.config["epochs"]
    if epochs is None or check_option("epochs", epochs) == before:
        return saved
    if epochs < saved.epoch:
        raise ValueError(
            f"epochs: expected {saved.epoch} or more, which {printable(out / checkpoint.INDEX)} "
            f"holds, got {epochs}"
        )
    step = {"after_epoch": saved.epoch, "epochs": int(epochs), "before": before}
    config = {**saved.config, "epochs": int(epochs)}
    return replace(saved, config=config, extended=[*saved.extended, step])


def note_extension(saved: Checkpoint) -> None:
    """Say on standard error how a run was extended last."""
    behind, epochs, before = (saved.extended[-1][name] for name in _EXTENSION)
    say(
        f"adatape-kernels: note: the run of {before} epochs goes on from epoch {behind} to epoch "
        f"{epochs}, with the learning rate that a run of {epochs} epochs has there"
    )


def _check_extensions(extensions: Sequence[Any], done: int, epochs: int) -> None:
    """Raise ValueError unless a checkpoint's extensions lead to its number of epochs."""
    least, last = 0, None
    for entry in extensions:
        if not isinstance(entry, dict) or tuple(entry) != _EXTENSION:
            raise ValueError(f"extended: expected {', '.join(_EXTENSION)}, got {shown(entry)}")
        least = as_integer("extended: after_epoch", entry["after_epoch"], least, done)
        for name in ("epochs", "before"):
            as_integer(f"extended: {name}", entry[name], max(1, least), MOST_EPOCHS)
        if last not in (None, entry["before"]):
            raise ValueError(f"extended: expected {last} epochs before, got {entry['before']}")
        last = entry["epochs"]
    if last not in (None, epochs):
        raise ValueError(f"extended: expected {epochs} epochs in the end, got {last}")
