"""The command `budget`: accuracy, rows, FLOPs and images per second of models at many limits."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adatape_kernels.arguments import check_path, shown
from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.image_set import evenly_spaced, unit_range
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes import measure, pictures
from adatape_kernels.recipes.adatape_runs import (
    adatape_of_run,
    check_report_folder,
    names_of_runs,
)
from adatape_kernels.recipes.budget.budget_picture import drawn
from adatape_kernels.recipes.budget.budget_result import BudgetResult
from adatape_kernels.recipes.devices import chosen_device, moved
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import claim, folder_argument
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.train_loop import accuracy, predict

PICTURE = "budget.png"
MOST_TAPE = 1 << 20
_TIMED_IMAGES = 256
_COMPARED_IMAGES = 64
_NAME_WIDTH = 30


class _BudgetRun(NamedTuple):
    """A run's model, and what it is measured on."""

    name: str
    model: AdaTapeViT
    data: ImageSet
    normalise: Normaliser


def run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    beside: Sequence[str | os.PathLike[str]] = (),
    thresholds: Sequence[float] | None = None,
    max_tape: Sequence[int] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    rounds: int = 5,
    device: str | torch.device = "auto",
) -> list[BudgetResult]:
    """Measure a run's model at each threshold and each longest tape, and write what came out.

    Args:
        source: the folder of a run of `train` or of the demo.
        out: a folder, made if it is missing.
        beside: folders of further runs on the same images, measured at the same limits.
        thresholds: halting thresholds; None for some around the own one of the first model.
        max_tape: most tape tokens of a read; None for the first model's own.
        data_dir: the image set's folder; None for where it was.
        rounds: number of times that each batch is timed, all models and limits in turn.
        device: where to compute, as `devices.chosen_device` has it.

    Raises:
        ValueError: a folder holds no run of an AdaTape of images, runs have different test images,
            a limit is out of range, or `out` cannot be written or is the folder of a run or of
            another command; the error names it.
        OSError: a file cannot be read or written.
        RuntimeError: a package of the extra `demo` is missing.
    """
    place = chosen_device(device)
    folder = folder_argument("out", out)
    as_integer("rounds", rounds, 1)
    chosen = _numbers(thresholds)
    tapes = _lengths(max_tape)
    pictures.require("budget")
    check_output_folder(folder)
    check_report_folder(folder, ("results", "own"))
    first, *others = looked = _look([source, *beside], data_dir, place)
    own = first.model.config
    results = _measured(
        looked,
        chosen or _around(own.halt_threshold),
        tapes or (own.num_tape_tokens,),
        rounds,
        place,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with lenient_output(), claim(folder) as writing:
        report = {
            "results": [asdict(result) for result in results],
            "run": first.name,
            "own": _own_limits(first.model),
            "beside": [{"run": each.name, "own": _own_limits(each.model)} for each in others],
            **environment(place),
        }
        writing.write(REPORT, json_bytes(report))
        writing.write(PICTURE, drawn(results))
        print(table(results))
        print(f"report and picture: {printable(folder)}{os.sep}")
    return results


def _look(
    sources: Sequence[str | os.PathLike[str]],
    data_dir: str | os.PathLike[str] | None,
    device: torch.device,
) -> list[_BudgetRun]:
    """Load runs, all with the test images of the first. Raises ValueError, as `run` does."""
    folders = [check_path("beside" if number else "run", s) for number, s in enumerate(sources)]
    looked: list[_BudgetRun] = []
    for folder, name in zip(folders, names_of_runs(folders), strict=True):
        argument = "beside" if looked else "run"
        model = adatape_of_run(argument, folder, device)
        data = images_of_run(folder, None if data_dir is None else Path(data_dir))
        if looked and not _same_images(data, looked[0].data):
            raise ValueError(
                f"beside: expected a run on the test images of {looked[0].name}, "
                f"got {printable(folder)}, which has others"
            )
        looked.append(_BudgetRun(name, model, data, normaliser_of(model)))
    return looked


def _same_images(data: ImageSet, other: ImageSet) -> bool:
    """Return whether two sets have the same test images, as far as can be told by some of them.

    Images of two sizes are told apart by their labels alone.
    """
    if data.class_names != other.class_names or not torch.equal(
        data.test_labels, other.test_labels
    ):
        return False
    some = evenly_spaced(len(data.test_labels), _COMPARED_IMAGES)
    ours, theirs = unit_range(data.test_images[some]), unit_range(other.test_images[some])
    return ours.shape != theirs.shape or torch.equal(ours, theirs)


def _own_limits(model: AdaTapeViT) -> dict[str, Any]:
    own = model.config
    names = ("halt_threshold", "num_tape_tokens", "topk")
    return {name: getattr(own, name) for name in names}


def _around(threshold: float) -> tuple[float, ...]:
    """Return thresholds around the model's own, which is one of them."""
    if not math.isfinite(threshold) or threshold <= 0:
        return (threshold,)
    return tuple(threshold * share for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0))


def _numbers(values: Sequence[float] | None) -> tuple[float, ...]:
    """Return distinct thresholds in ascending order, none of None. Raises ValueError."""
    if values is None:
        return ()
    found = sorted({as_number("thresholds", value) for value in values})
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"thresholds: expected one or more finite numbers, got {shown(values)}")
    return tuple(found)


def _lengths(values: Sequence[int] | None) -> tuple[int, ...]:
    """Return distinct longest tapes in ascending order, none of None. Raises ValueError."""
    if values is None:
        return ()
    found = sorted({as_integer("max-tape", value, 0, MOST_TAPE) for value in values})
    if not found:
        raise ValueError(f"max-tape: expected one or more numbers, got {shown(values)}")
    return tuple(found)


def _measured(
    looked: Sequence[_BudgetRun],
    thresholds: Sequence[float],
    tapes: Sequence[int],
    rounds: int,
    device: torch.device,
) -> list[BudgetResult]:
    """Measure models on the test images of their runs."""
    cases = [
        (number, threshold, longest)
        for number in range(len(looked))
        for longest in tapes
        for threshold in thresholds
    ]
    sample = evenly_spaced(len(looked[0].data.test_labels), _TIMED_IMAGES)
    batches = [
        moved(each.normalise(unit_range(each.data.test_images[sample])), device) for each in looked
    ]
    for each in looked:
        each.model.eval()

    def forward(number: int, threshold: float, longest: int) -> None:
        model = looked[number].model
        with torch.no_grad():
            model(
                batches[number],
                halt_threshold=threshold,
                num_tape_tokens=_possible(model, longest),
            )

    forwards = {str(case): functools.partial(forward, *case) for case in cases}
    times = measure.seconds(forwards, rounds, device=device)
    results = []
    for case in cases:
        number, threshold, longest = case
        name, model, data, normalise = looked[number]
        output = predict(
            model,
            data.test_images,
            normalise,
            halt_threshold=threshold,
            num_tape_tokens=_possible(model, longest),
        )
        tape = output.tape_lens.double().mean().item()
        timing, images = times[str(case)], len(sample)
        results.append(
            BudgetResult(
                name,
                threshold,
                longest,
                accuracy(output, data.test_labels),
                tape,
                model.embed(batches[number][:1])[0].shape[1] + tape,
                measure.flops(forwards[str(case)]) / images,
                images / timing.median,
                (images / timing.p80, images / timing.p20),
            )
        )
    return results


def _possible(model: AdaTapeViT, longest: int) -> int:
    """Return the most tape tokens that a read of up to `longest` can have of the model's bank.

    A step beyond them would read nothing, and yet have room in memory.
    """
    c = model.config
    entries = (c.image_size // c.bank_patch_size) ** 2 if c.bank == "input" else c.bank_size
    return min(longest, -(-entries // c.topk))


def table(results: Sequence[BudgetResult]) -> str:
    """Return the results as text, a line for each model and pair of limits."""
    several = len({r.run for r in results}) > 1
    names = [printable(r.run, _NAME_WIDTH) if several else "" for r in results]
    width = max(3, *map(len, names))

    def line(name: str, rest: str) -> str:
        return f"{name:{width}} {rest}" if several else rest

    lines = [
        "",
        line(
            "run",
            f"{'threshold':>9} {'max tape':>9} {'accuracy':>9} {'tape':>7} {'rows':>7} "
            f"{'MFLOP':>9} {'images/s':>9}",
        ),
    ]
    lines += [
        line(
            name,
            f"{r.halt_threshold:9.3g} {r.num_tape_tokens:9} {r.accuracy:9.2%} "
            f"{r.mean_tape_tokens:7.2f} {r.mean_rows:7.1f} {r.flops / 1e6:9.2f} "
            f"{r.images_per_second:9,.0f}",
        )
        for name, r in zip(names, results, strict=True)
    ]
    return "\n".join(lines)
