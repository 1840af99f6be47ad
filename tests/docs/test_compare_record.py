"""The table of compared models in README.md and its guide says what the recorded run says."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/compare-fashion-mnist.json").read_text())


def over_seeds(results, field, shown, unit=1.0):
    values = [result[field] / unit for result in results]
    return f"{statistics.mean(values):{shown}} ± {statistics.stdev(values):{shown}}"


def lines():
    groups = {}
    for result in RECORD["results"]:
        groups.setdefault((result["model"], result["size"]), []).append(result)
    for (model, size), results in groups.items():
        assert [result["seed"] for result in results] == RECORD["options"]["seeds"]
        on_front = [model, size] in RECORD["pareto_front"]["flops_per_image"]
        cells = [f"`{model}`", str(size), over_seeds(results, "accuracy", ".2f", 0.01)]
        cells += [over_seeds(results, "images_per_second", ",.0f")]
        cells += [over_seeds(results, "flops_per_image", ".2f", 1e6)]
        cells += [over_seeds(results, "mean_rows", ".1f"), "yes" if on_front else ""]
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |")


def test_the_tables_are_those_of_the_record():
    table = "\n".join(lines())
    assert table.count("\n") + 1 == 12
    for page in ("README.md", "docs/guides/compare-models.md"):
        assert table in (ROOT / page).read_text(), page


def test_what_is_said_about_the_front():
    """Both pages say that AdaTape is on neither front, and mark one column for both."""
    assert RECORD["adatape_on_front"] == {"images_per_second": False, "flops_per_image": False}
    fronts = RECORD["pareto_front"]
    assert fronts["images_per_second"] == fronts["flops_per_image"]


def test_the_record_names_what_it_ran_on():
    named = {"machine", "torch", "adatape_kernels", "commit", "commands"}
    assert named <= RECORD.keys()
    plan = RECORD["plan"]
    assert (plan["epochs"], plan["images"], RECORD["jobs"]) == (5, 60_000, 2)
