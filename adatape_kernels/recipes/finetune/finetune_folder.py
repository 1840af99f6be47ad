"""What the folder of a comparison holds: a plan that is new, or one that goes on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import check_kind, shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.finetune.finetune_plan import FinetunePlan
from adatape_kernels.recipes.output_folder import check_output_folder, check_run_folder
from adatape_kernels.recipes.run_folder import leftovers
from adatape_kernels.recipes.training.option_checks import given_options, option_name

PLAN = "finetune.json"
"""Name of the file that holds what a comparison was started with."""
SOURCE = "vit.safetensors"
"""Name of the file of a source that was trained here, in timm's names."""
DEFAULT_SEEDS, MOST_SEEDS = 3, 100


def new_plan(folder: Path, given: dict[str, Any]) -> FinetunePlan:
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


def saved_plan(folder: Path, given: Mapping[str, Any]) -> FinetunePlan:
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
