"""The tables in docs/guides/parity.md of what was tried say what the recorded runs say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks/results/parity-past-the-paper.json"
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
