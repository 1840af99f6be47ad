"""Tables of the guides say what the recorded comparisons hold."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS, GUIDES = ROOT / "benchmarks/results", ROOT / "docs/guides"


def row(*cells):
    return f"| {' | '.join(cells)} |"


def test_the_table_of_two_budgets():
    recorded = json.loads((RESULTS / "budget-fashion-mnist.json").read_text())
    assert {"machine", "torch", "adatape_kernels", "commit", "commands"} <= recorded.keys()
    results = {(r["run"], r["halt_threshold"]): r for r in recorded["results"]}
    thresholds = sorted({threshold for _, threshold in results})
    assert len(thresholds) == 10 and len(results) == 20
    lines = []
    for threshold in thresholds:
        cells = [f"{threshold:g}"]
        for run in ("one", "drawn"):
            r = results[run, threshold]
            cells += [f"{100 * r['accuracy']:.2f} %", f"{r['mean_rows']:.1f}"]
            cells += [f"{r['flops'] / 1e6:.2f}", f"{r['images_per_second']:,.0f}"]
        lines.append(row(*cells))
    assert "\n".join(lines) in (GUIDES / "turn-the-cost.md").read_text()


def test_the_table_of_what_is_read_of_natural_images():
    recorded = json.loads((RESULTS / "heatmap-cifar10.json").read_text())
    assert {"machine", "torch", "adatape_kernels", "commit", "commands"} <= recorded.keys()
    models = recorded["models"]
    assert [model["config"]["patch"] for model in models] == [4, 8]
    reads, lengths = [m["reads"][0] for m in models], [m["lengths"] for m in models]
    assert all(read["uniform_share"] == 0.25 for read in reads)
    guide = (GUIDES / "what-is-read.md").read_text()
    for words, cells in (
        ("test accuracy", [f"{m['test_accuracy']:.1%}" for m in models]),
        ("of all reads", [f"{read['centre_share']:.1%}" for read in reads]),
        *(
            (f"of those of step {step + 1}", [share(read, step) for read in reads])
            for step in range(10)
        ),
        ("all", [f"{each['mean']:.2f}" for each in lengths]),
        ("classified right", [f"{each['right']:.2f}" for each in lengths]),
        ("classified wrong", [f"{each['wrong']:.2f}" for each in lengths]),
        ("with noise", [f"{each['noisy']:.2f}" for each in lengths]),
        ("blurred", [f"{each['blurred']:.2f}" for each in lengths]),
        (
            "correlation of tape length and loss",
            [f"{each['correlation_with_loss']:.2f}".replace("-", "−") for each in lengths],
        ),
    ):
        assert row(words, *(cell.replace("%", " %") for cell in cells)) in guide, words


def share(read, step):
    """The middle's share of a step's reads, and how many images take the step."""
    known = read["centre_share_by_step"][step]
    images = f"{read['images_by_step'][step]:,} images"
    return images if known is None else f"{known:.1%} ({images})"
