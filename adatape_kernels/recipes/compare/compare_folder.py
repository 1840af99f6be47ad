"""What the folder of a comparison holds: the plan, runs that are trained, and the report."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models.value_checks import as_number
from adatape_kernels.recipes.compare.compare_config import MODELS, CompareConfig, CompareRun
from adatape_kernels.recipes.compare.compare_plan import ComparePlan, Costs, RunCost
from adatape_kernels.recipes.compare.compare_result import CompareResult
from adatape_kernels.recipes.compare.compare_training import Trained, Training
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder
from adatape_kernels.recipes.training.data_fingerprint import HASHED

_NUMBERS = ("images_per_second", "flops_per_image", "parameters", "mean_rows")
PLAN, TABLE, PICTURE = "plan.json", "table.md", "compare.png"


def options_of(config: CompareConfig) -> dict[str, Any]:
    """Return a configuration in the types that JSON gives back."""
    options: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return options


def write_plan(
    out: RunFolder,
    config: CompareConfig,
    facts: Mapping[str, Any],
    plan: ComparePlan,
    costs: Costs,
) -> None:
    """Write what all runs of the folder are trained by.

    Args:
        out: what writes into the folder.
        config: what is compared.
        facts: by which the images are recognised.
        plan: what was chosen.
        costs: what that was chosen by.
    """
    entries = {
        "options": options_of(config),
        "data": facts,
        "plan": asdict(plan),
        "costs": [[*key, *cost] for key, cost in costs.items()],
    }
    out.write(PLAN, json_bytes(entries))


def saved_plan(
    folder: Path, config: CompareConfig, facts: Mapping[str, Any]
) -> tuple[ComparePlan, dict[tuple[str, int], RunCost]] | None:
    """Return the plan and the costs that a folder holds, or None.

    Raises:
        ValueError: the file is none of ours, or of other options or other images.
    """
    file = folder / PLAN
    entries = _content(file)
    if entries is None:
        return None
    try:
        options, data = dict(entries["options"]), dict(entries["data"])
        plan = ComparePlan(**entries["plan"])
        found = {
            (str(model), int(size)): RunCost(float(train), float(test))
            for model, size, train, test in entries["costs"]
        }
        whole = all(0 < second < math.inf for cost in found.values() for second in cost)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{printable(file)}: expected the plan of a comparison, got another content"
        ) from None
    for name, value in options_of(config).items():
        if options.get(name) != value:
            raise ValueError(
                f"{name}: expected {shown(options.get(name))}, as in {printable(file)}, "
                f"got {shown(value)}"
            )
    for name, value in facts.items():
        if data.get(name) != value:
            raise ValueError(
                f"data-dir: expected the images of {printable(file)}, got others, whose "
                f"{HASHED.get(name, name)} differ"
            )
    if not whole or not all((run.model, run.size) in found for run in config.runs()):
        raise ValueError(
            f"{printable(file)}: expected the plan of a comparison, got another content"
        )
    return plan, found


def write_run(out: RunFolder, trained: Trained) -> None:
    """Write the model of a run, and then what says that it is there."""
    stem = trained.run.stem
    out.write(f"{stem}.safetensors", trained.model)
    out.write(f"{stem}.json", json_bytes(trained.training._asdict()))


def saved_run(folder: Path, run: CompareRun) -> Training | None:
    """Return what training a run came to, or None where the folder lacks it or its model.

    Raises:
        ValueError: the file is none of ours.
    """
    file = folder / f"{run.stem}.json"
    entries = _content(file)
    if entries is None or not (folder / f"{run.stem}.safetensors").exists():
        return None
    try:
        training = Training(**{name: float(value) for name, value in entries.items()})
    except (AttributeError, ValueError, TypeError):
        training = Training(math.nan, math.nan, math.nan)
    if not all(map(math.isfinite, training)):
        raise ValueError(
            f"{printable(file)}: expected the result of {run.stem}, got another content"
        )
    return training


def saved_results(folder: Path, config: CompareConfig) -> list[CompareResult] | None:
    """Return the results of the report, or None where it is not that of all runs."""
    try:
        report = _content(folder / REPORT)
        if report is None or report["options"] != options_of(config):
            return None
        results = [CompareResult(**entry) for entry in report["results"]]
        for result in results:
            if not _is_possible(result):
                return None
    except (ValueError, KeyError, TypeError):
        return None
    runs = [CompareRun(result.model, result.size, result.seed) for result in results]
    return results if runs == [*config.runs()] else None


def _is_possible(result: CompareResult) -> bool:
    """Return whether a run can have come to such a result. Raises ValueError over other types."""
    tape = result.mean_tape_tokens
    return (
        0 <= as_number("accuracy", result.accuracy) <= 1
        and all(0 < as_number(name, getattr(result, name)) < math.inf for name in _NUMBERS)
        and (tape is None or 0 <= as_number("mean_tape_tokens", tape) < math.inf)
        and (tape is None) == (MODELS[result.model]["model_name"] != "adatape")
    )


def _content(file: Path) -> Any:
    """Return the content of a JSON file, None where there is none.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{printable(file)}: expected a file, got {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{printable(file)}: expected JSON, got another content") from None
