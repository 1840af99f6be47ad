"""The command `parity`: all runs of the table, one after another, each kept when it is done."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeParity
from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.adatape_runs import check_report_folder
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.rank_workers import runs_at_a_time, runs_dealt_out
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.one_thread import one_thread
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.parity.parity_models import new_model
from adatape_kernels.recipes.parity.parity_picture import drawn
from adatape_kernels.recipes.parity.parity_training import ParityResult, eval_sequences
from adatape_kernels.recipes.parity.parity_workers import Progress, Workplace, in_processes
from adatape_kernels.recipes.parity.reads_picture import (
    drawn_reads,
    pairs_tell_parity,
    reading_of,
)
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder, claim, folder_argument
from adatape_kernels.recipes.table_bars import TableBars
from adatape_kernels.recipes.terminal import lenient_output

PICTURE = "parity.png"
_DRAWN_EXAMPLES = 400


def run(
    out: str | os.PathLike[str],
    config: ParityConfig,
    *,
    jobs: int | None = None,
    backends: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> list[ParityResult]:
    """Train what is not trained yet, and write report.json and parity.png into `out`.

    reads-LENGTH.png shows what the best AdaTape of a length reads. Each run leaves
    NAME-LENGTH-SEED.json and .safetensors. A run that is there already, with the same options, is
    taken as it is; so a table that was interrupted, or that is to be larger, goes on where it
    ended.

    Args:
        out: a folder, made if it is missing.
        config: which runs there are, and how each is trained.
        jobs: number of runs at a time, each in a process with one thread; None for one a core, and
            for one alone on a GPU. Under torchrun each of its processes takes a run at a time.
        backends: the backend that serves the ops, and those that serve what it does not; the
            fastest by default.
        device: where to compute, as `devices.chosen_device` has it.

    Returns:
        The results of all runs, in their order; none on other ranks than rank 0.

    Raises:
        ValueError: `out` cannot be made or written, another process writes into it, or it holds a
            run that was trained in another way, another model or another command's report; the
            error names the file. Or jobs is below 1.
        OSError: a file cannot be written.
        RuntimeError: a package of the extra `demo` is missing, a loss is not finite, or a process
            was ended.
    """
    where = chosen_device(device)
    folder = folder_argument("out", out)
    jobs = runs_at_a_time(jobs, where)
    pictures.require("parity")
    asked = {name.replace("_", "-"): value for name, value in asdict(config).items()}
    with runs_dealt_out(where, {**asked, "backend": tuple(backends)}) as works:
        return _run(folder, config, Workplace(jobs, where, tuple(backends))) if works else []


def _run(folder: Path, config: ParityConfig, workplace: Workplace) -> list[ParityResult]:
    """Do what `run` says."""
    check_output_folder(folder)
    check_report_folder(folder, ("results", "pairs_tell_parity"))
    folder.mkdir(parents=True, exist_ok=True)
    with lenient_output(), one_thread(), claim(folder) as run_folder:
        done = {each: _finished(folder, each, config) for each in config.runs()}
        results = _train_rest(run_folder, config, done, workplace)
        print(table(results))
        print(f"report, picture and models: {printable(folder)}{os.sep}")
        return results


def _train_rest(
    out: RunFolder,
    config: ParityConfig,
    done: dict[Run, ParityResult | None],
    workplace: Workplace,
) -> list[ParityResult]:
    """Train the runs that have no result, with a bar for the table and one for each run."""

    def finished() -> list[ParityResult]:
        return [result for result in done.values() if result is not None]

    left = [each for each, result in done.items() if result is None]
    with _counted_where_it_ends(out, done), TableBars(len(done), len(finished())) as bars:
        for event in in_processes(left, config, workplace):
            if isinstance(event, Progress):
                known = event.accuracy
                shown_accuracy = "" if known is None else f"{known:.1%}"
                beside = {"loss": f"{event.loss:.3f}", "accuracy": shown_accuracy}
                bars.move(event.run.stem, event.steps, config.steps, beside)
                continue
            stem, result = event.run.stem, event.result
            out.write(f"{stem}.safetensors", event.model)
            out.write(
                f"{stem}.json",
                json_bytes(
                    {"training": config.training(event.run.length), "result": result.entries()}
                ),
            )
            done[event.run] = result
            bars.end(stem, f"{result.accuracy:.2%} in {result.seconds:.0f} s")
            bars.advance()
            _write_report(out, config, finished(), workplace.device)
    pairs = _draw_reads(out, config, finished(), workplace.device)
    _write_report(out, config, finished(), workplace.device, pairs)
    return finished()


@contextlib.contextmanager
def _counted_where_it_ends(
    out: RunFolder, done: Mapping[Run, ParityResult | None]
) -> Iterator[None]:
    """Say in an interruption how many runs are kept."""
    try:
        yield
    except KeyboardInterrupt:
        count = sum(result is not None for result in done.values())
        raise KeyboardInterrupt(
            f"{printable(out.folder)} holds {count} of {len(done)} runs; the same command goes on "
            "from there"
        ) from None


def _draw_reads(
    out: RunFolder, config: ParityConfig, results: list[ParityResult], device: torch.device
) -> dict[str, float]:
    """Draw what the best AdaTape of each length reads.

    Returns:
        By length, for how many of the sequences split pairs tell the label.
    """
    found: dict[str, float] = {}
    own = [result for result in results if result.model == "adatape"]
    for length in dict.fromkeys(result.length for result in own):
        best = max((r for r in own if r.length == length), key=lambda result: result.accuracy)
        stem = Run(best.model, best.length, best.seed).stem
        file = out.folder / f"{stem}.safetensors"
        model = load(file, device=device)
        expected = new_model(
            best.model, length, sequence_token=config.has_sequence_token(length)
        ).config
        if not isinstance(model, AdaTapeParity) or model.config != expected:
            raise ValueError(f"{printable(file)}: expected the model of {stem}, got another")
        sequences = eval_sequences(length, _DRAWN_EXAMPLES, config.protocol)
        out.write(f"reads-{length}.png", drawn_reads(model, sequences))
        found[str(length)] = pairs_tell_parity(reading_of(model, sequences), sequences.labels)
    return found


def _write_report(
    out: RunFolder,
    config: ParityConfig,
    results: list[ParityResult],
    device: torch.device,
    pairs: dict[str, float] | None = None,
) -> None:
    report = {
        "results": [result.entries() for result in results],
        "pairs_tell_parity": pairs or {},
        "options": asdict(config),
        **environment(device),
    }
    out.write(REPORT, json_bytes(report))
    out.write(PICTURE, drawn(results))


def _finished(folder: Path, each: Run, config: ParityConfig) -> ParityResult | None:
    """Return the result that a folder has of a run, or None where it lacks that or the model.

    Raises:
        ValueError: the file is none of ours, or the run was trained in another way.
    """
    file = folder / f"{each.stem}.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{file}: expected the result of a run, got {error.strerror}") from None
    try:
        entries = json.loads(content)
        # Runs of before there was a choice were computed in float32.
        training, result = {"dtype": "float32", **entries["training"]}, dict(entries["result"])
        curve = tuple((int(n), float(loss), float(a)) for n, loss, a in result.pop("curve"))
        found = ParityResult(**result, curve=curve)
        fits = (found.model, found.length, found.seed) == each and _is_possible(found)
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{file}: expected the result of {each.stem}, got another content")
    expected = config.training(each.length)
    for name, value in expected.items():
        if training.get(name) != value:
            raise ValueError(
                f"{name.replace('_', '-')}: expected {shown(training.get(name))}, as in {file}, "
                f"got {shown(value)}"
            )
    return found if (folder / f"{each.stem}.safetensors").exists() else None


def _is_possible(result: ParityResult) -> bool:
    """Return whether a run can have come to such a result. Raises ValueError over other types."""
    shares = [result.accuracy, result.trained_accuracy, *(point[2] for point in result.curve)]
    rest = [result.seconds, result.work_per_example, *(point[1] for point in result.curve)]
    for name in ("parameters", "steps"):
        as_integer(name, getattr(result, name), 1)
    return all(0 <= as_number("accuracy", share) <= 1 for share in shares) and all(
        0 <= as_number("result", number) < math.inf for number in rest
    )


def table(results: list[ParityResult]) -> str:
    """Return the results as text, a line for each model and length."""
    lines = [
        "",
        f"{'length':>6}  {'model':20} {'accuracy: mean, least to most':>32} {'as trained':>11} "
        f"{'seeds':>6} {'seconds':>8} {'parameters':>11}",
    ]
    for length in dict.fromkeys(result.length for result in results):
        for model in dict.fromkeys(result.model for result in results):
            group = [r for r in results if (r.model, r.length) == (model, length)]
            if not group:
                continue
            values = [result.accuracy for result in group]
            mean = sum(values) / len(values)
            spread = f"{mean:8.2%}"
            if len(values) > 1:
                spread += f"  {min(values):8.2%} to {max(values):8.2%}"
            trained = sum(result.trained_accuracy for result in group) / len(group)
            seconds = sum(result.seconds for result in group) / len(group)
            lines.append(
                f"{length:6}  {model:20} {spread:32} {trained:11.2%} {len(group):6} "
                f"{seconds:8.0f} {group[0].parameters:11,}"
            )
    return "\n".join(lines)
