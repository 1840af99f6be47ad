"""The tables in docs/guides/parity.md say what the recorded runs say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks/results/parity-past-the-paper.json"
TABLE = ROOT / "benchmarks/results/parity.json"
PAGE = ROOT / "docs/guides/parity.md"


def span(values, shown):
    least, most = shown(min(values)), shown(max(values))
    return least if least == most else f"{least} to {most}"


def line(row):
    """The row of the page's table for one way of training."""
    columns = {name: [run.get(name) for run in row["runs"]] for name in row["runs"][0]}

    def share(name):
        return span(columns[name], lambda value: f"{100 * value:.1f} %")

    cells = [row["length"], row["form"], row["trained_on"], row["batch"], len(row["runs"])]
    cells += [span(columns["steps"], str), span(columns["cpu_seconds"], lambda s: f"{s:.0f}")]
    if row["protocol"] == "extrapolate":
        cells.append(share("trained_accuracy"))
    return "| " + " | ".join(str(cell) for cell in [*cells, share("accuracy")]) + " |"


def test_the_page_has_the_rows_of_the_record_and_no_others():
    rows = json.loads(RECORD.read_text())["rows"]
    shown = [text for text in PAGE.read_text().splitlines() if text[:3] in ("| 1", "| 6", "| 9")]
    assert shown == [line(row) for row in rows]


def test_a_run_is_the_end_of_its_curve():
    for row in json.loads(RECORD.read_text())["rows"]:
        for run in row["runs"]:
            steps, seconds, _, trained, accuracy = run["curve"][-1]
            assert (steps, seconds, accuracy) == (
                run["steps"],
                run["cpu_seconds"],
                run["accuracy"],
            )
            if row["protocol"] == "extrapolate":
                assert trained == run["trained_accuracy"]


def percent(share):
    return f"{100 * share:.2f} %"


def test_the_page_has_the_table_of_the_command_that_it_names():
    recorded = json.loads(TABLE.read_text())
    assert {"machine", "torch", "adatape_kernels", "commit", "commands"} <= recorded.keys()
    assert all(f"    {command}\n" in PAGE.read_text() for command in recorded["commands"])
    groups = {}
    for result in recorded["results"]:
        groups.setdefault((result["length"], result["model"]), []).append(result)
    lines = []
    for (length, model), results in groups.items():
        assert [result["seed"] for result in results] == [0, 1, 2]
        right = [result["accuracy"] for result in results]
        seconds = [result["seconds"] for result in results]
        cells = [model, length, percent(sum(right) / len(right)), span(right, percent)]
        cells += [span(seconds, lambda s: f"{s:.0f}"), f"{results[0]['parameters']:,}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    assert len(lines) == 9 and "\n".join(lines) in PAGE.read_text()
