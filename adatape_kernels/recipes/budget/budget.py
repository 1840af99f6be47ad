"""The command `budget`: accuracy, rows, FLOPs and images per second of one model at many limits."""

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from adatape_kernels.arguments import check_path, shown
from adatape_kernels.data.image_set import evenly_spaced, unit_range
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes import measure, pictures
from adatape_kernels.recipes.budget.budget_picture import drawn
from adatape_kernels.recipes.budget.budget_result import BudgetResult
from adatape_kernels.recipes.devices import chosen_device, device_of, moved
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.run_folder import claim, folder_argument
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.train_loop import accuracy, predict

REPORT, PICTURE = "report.json", "budget.png"
MOST_TAPE = 1 << 20
_TIMED_IMAGES = 256


def run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
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
        thresholds: halting thresholds; None for some around the model's own.
        max_tape: most tape tokens of a read; None for the model's own.
        data_dir: the image set's folder; None for where it was.
        rounds: number of times that each batch is timed, all limits in turn.
        device: where to compute, as `devices.chosen_device` has it.

    Raises:
        ValueError: the folder holds no run of an AdaTape of images, a limit is out of range, or
            `out` cannot be written; the error names it.
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
    where = check_path("run", source)
    model = load(where, device=place)
    if not isinstance(model, AdaTapeViT) or not model.config.read_layers:
        raise ValueError(
            f"run: expected that of an AdaTape of images that reads, got {printable(where)}, "
            f"a {type(model).__name__}"
        )
    own = model.config
    results = _measured(
        model,
        where,
        None if data_dir is None else Path(data_dir),
        chosen or _around(own.halt_threshold),
        tapes or (own.num_tape_tokens,),
        rounds,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with lenient_output(), claim(folder) as writing:
        report = {
            "results": [asdict(result) for result in results],
            "run": printable(where),
            "own": {
                "halt_threshold": own.halt_threshold,
                "num_tape_tokens": own.num_tape_tokens,
                "topk": own.topk,
            },
            **environment(place),
        }
        writing.write(REPORT, (json.dumps(report, indent=2) + "\n").encode())
        writing.write(PICTURE, drawn(results))
        print(table(results))
        print(f"report and picture: {printable(folder)}{os.sep}")
    return results


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
    model: AdaTapeViT,
    source: Path,
    data_dir: Path | None,
    thresholds: Sequence[float],
    tapes: Sequence[int],
    rounds: int,
) -> list[BudgetResult]:
    """Measure a model on the test images of its run."""
    data, normalise = images_of_run(source, data_dir), normaliser_of(model)
    sample = evenly_spaced(len(data.test_labels), _TIMED_IMAGES)
    device = device_of(model)
    batch = moved(normalise(unit_range(data.test_images[sample])), device)
    model.eval()
    inputs = model.embed(batch[:1])[0].shape[1]
    limits = [(threshold, longest) for longest in tapes for threshold in thresholds]

    def forward(threshold: float, longest: int) -> None:
        with torch.no_grad():
            model(batch, halt_threshold=threshold, num_tape_tokens=longest)

    forwards = {str(pair): functools.partial(forward, *pair) for pair in limits}
    times = measure.seconds(forwards, rounds, device=device)
    results = []
    for threshold, longest in limits:
        output = predict(
            model,
            data.test_images,
            normalise,
            halt_threshold=threshold,
            num_tape_tokens=longest,
        )
        tape = output.tape_lens.double().mean().item()
        name = str((threshold, longest))
        timing, images = times[name], len(batch)
        results.append(
            BudgetResult(
                threshold,
                longest,
                accuracy(output, data.test_labels),
                tape,
                inputs + tape,
                measure.flops(forwards[name]) / images,
                images / timing.median,
                (images / timing.p80, images / timing.p20),
            )
        )
    return results


def table(results: Sequence[BudgetResult]) -> str:
    """Return the results as text, a line for each pair of limits."""
    lines = [
        "",
        f"{'threshold':>9} {'max tape':>9} {'accuracy':>9} {'tape':>7} {'rows':>7} "
        f"{'MFLOP':>9} {'images/s':>9}",
    ]
    lines += [
        f"{r.halt_threshold:9.3g} {r.num_tape_tokens:9} {r.accuracy:9.2%} "
        f"{r.mean_tape_tokens:7.2f} {r.mean_rows:7.1f} {r.flops / 1e6:9.2f} "
        f"{r.images_per_second:9,.0f}"
        for r in results
    ]
    return "\n".join(lines)
