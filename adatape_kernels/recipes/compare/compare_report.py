"""What the report of a comparison holds, and what stands above its picture."""

from dataclasses import asdict
from typing import Any

from adatape_kernels.recipes.compare.compare_config import CompareConfig
from adatape_kernels.recipes.compare.compare_folder import options_of
from adatape_kernels.recipes.compare.compare_plan import ComparePlan
from adatape_kernels.recipes.compare.compare_result import (
    COSTS,
    CompareResult,
    grouped,
    pareto_front,
)
from adatape_kernels.recipes.compare.compare_work import CompareWork
from adatape_kernels.recipes.machine import environment


def report_of(
    work: CompareWork, plan: ComparePlan, results: list[CompareResult], seconds: float
) -> dict[str, Any]:
    """Return what report.json holds.

    Args:
        work: what was compared.
        plan: how much was trained.
        results: those of all runs.
        seconds: how long all of it took.
    """
    groups = grouped(results)
    fronts = {cost: pareto_front(groups, cost) for cost in COSTS}
    return {
        "results": [result.entries() for result in results],
        "pareto_front": {
            cost: [[group.model, group.size] for group in front] for cost, front in fronts.items()
        },
        "adatape_on_front": {
            cost: any(group.is_adatape for group in front) for cost, front in fronts.items()
        },
        "options": options_of(work.config),
        "plan": asdict(plan),
        "data": work.facts,
        "jobs": work.jobs,
        "wall_seconds": seconds,
        **environment(work.device),
    }


def picture_title(config: CompareConfig, plan: ComparePlan) -> str:
    """Return what stands above the picture."""
    seeds, epochs = len(config.seeds), plan.epochs
    over = "one seed"
    if seeds > 1:
        over = f"means over {seeds} seeds, thin crosses: their standard deviation"
    return (
        f"{config.data}: {epochs} epoch{'s' * (epochs > 1)} of {plan.images:,} training "
        f"images; {over}; beside the marks: layers"
    )
