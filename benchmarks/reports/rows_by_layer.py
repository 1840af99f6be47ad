"""Draws the rows alive in each layer of trained models, beside the layers' milliseconds.

    sizes="--data fashion-mnist --patch 7 --dim 64 --depth 6 --heads 2 --ffn 128 --epochs 8"
    adatape-kernels train --model avit $sizes --out runs/avit
    adatape-kernels train --model uvit $sizes --out runs/uvit
    python -m adatape_kernels.benchmarks.reports.rows_by_layer runs/avit runs/uvit

Each model classifies the whole test set and then, for the times, one batch of it, as it is and in
the form that masks what has halted. The figures go to a JSON file, the picture beside them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from adatape_kernels.data import Normaliser, load
from adatape_kernels.data.image_set import evenly_spaced, unit_range
from adatape_kernels.halting import report
from adatape_kernels.models import HaltingClassifier, ImageClassifier
from adatape_kernels.recipes import model_loading
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_comparison import rows_by_layer, rows_of_image
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.training.train_loop import accuracy, predict

REPOSITORY = Path(__file__).parents[2]
RESULT = REPOSITORY / "benchmarks/results/halting-fashion-mnist.json"
PICTURE = REPOSITORY / "docs/_static/rows-by-layer.png"
FORMS = ("leaves", "masks")
NAMES = {"AViT": "A-ViT: tokens halt", "UViT": "UViT: images halt"}
# The forms differ in lightness and in hatching, so that they do without colours.
STYLES: dict[str, dict[str, str]] = {
    "leaves": {"facecolor": "#1f4e79", "edgecolor": "black", "label": "rows that halted leave"},
    "masks": {
        "facecolor": "white",
        "edgecolor": "black",
        "hatch": "////",
        "label": "they stay, and are masked",
    },
}


def measure(run: Path, data_dir: Path | None, images: int, repeats: int) -> dict[str, Any]:
    """Return what a finished run of `train` computes for the test images of its set.

    Raises:
        ValueError: the folder holds no finished run of a model whose rows halt.
    """
    model = model_loading.load(run)
    if not isinstance(model, HaltingClassifier) or not (run / REPORT).is_file():
        raise ValueError(f"run: expected a finished run of a model that halts, got {run}")
    of_images = cast(ImageClassifier, model)
    config = json.loads((run / REPORT).read_text())["config"]
    seed = config["seed"] if config["split_seed"] is None else config["split_seed"]
    data = load(config["data"], data_dir, image_size=config["image_size"], seed=seed)
    preprocessing = model.preprocessing
    assert preprocessing is not None  # of a run that `train` made
    normalise = Normaliser(preprocessing.mean, preprocessing.std)
    output = predict(of_images, data.test_images, normalise)
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "test_accuracy": accuracy(output, data.test_labels),
        "test_images": len(output),
        "rows_of_an_image": rows_of_image(of_images),
        "rows_by_layer": rows_by_layer(of_images, output),
        "timed_images": images,
        "config": config,
    }
    batch = normalise(unit_range(data.test_images[evenly_spaced(len(output), images)]))
    forms = dict(zip(FORMS, (model, masked_form(model)), strict=True))
    with torch.no_grad():
        # In turn, so that a machine that is busy for a while is so for both.
        rounds = [
            {name: report(form, batch, repeats=1).steps for name, form in forms.items()}
            for _ in range(repeats)
        ]
    for name in FORMS:
        steps = zip(*(one[name] for one in rounds), strict=True)
        found[name] = [
            {**asdict(step[0]), "milliseconds": median(one.milliseconds for one in step)}
            for step in steps
        ]
    return found


def masked_form(model: Any) -> Any:
    """Return the form of a model that masks, for evaluation."""
    return model.padded().eval()


def draw(path: Path, models: Sequence[dict[str, Any]]) -> None:
    """Draw the rows and the milliseconds of each layer, a line of two panels for each model."""
    from matplotlib.figure import Figure

    size = (8.4, 2.9 * len(models) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    for (rows, times), found in zip(panels, models, strict=True):
        layers = len(found["rows_by_layer"])
        full = found["rows_of_an_image"]
        alive = [count / found["test_images"] for count in found["rows_by_layer"]]
        title = f"{NAMES.get(found['model'], found['model'])}; {found['test_accuracy']:.1%} right"
        stay = len(found["masks"]) * [float(full)]  # both forms stop when nothing runs
        _bars(rows, {"leaves": alive, "masks": stay}, title, "rows alive, of an image")
        milliseconds = {form: [step["milliseconds"] for step in found[form]] for form in FORMS}
        total = [sum(milliseconds[form]) for form in FORMS]
        title = f"{found['timed_images']} images: {total[0]:.0f} ms instead of {total[1]:.0f}"
        _bars(times, milliseconds, title, "milliseconds")
        for panel in (rows, times):
            panel.set(xticks=range(1, layers + 1), xlim=(0.4, layers + 0.6))
    for panel in panels[-1]:
        panel.set_xlabel("layer")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _bars(panel: Any, heights: dict[str, list[float]], title: str, unit: str) -> None:
    width = 0.4
    for number, form in enumerate(FORMS):
        places = [layer + 1 + (number - 0.5) * width for layer in range(len(heights[form]))]
        bars = panel.bar(places, heights[form], width, linewidth=0.8, **STYLES[form])
        if form == "masks":
            continue
        for text in panel.bar_label(bars, [f"{height:.1f}" for height in heights[form]], padding=2):
            text.set(fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_ylabel(unit)
    panel.margins(y=0.12)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run of train")
    parser.add_argument("--data-dir", type=Path, help="the set's files, as train takes it")
    parser.add_argument("--images", type=int, default=512, help="default: %(default)s, of a batch")
    parser.add_argument("--repeats", type=int, default=21, help="default: %(default)s, of times")
    parser.add_argument("--json", type=Path, default=Path(RESULT.name), help="default: %(default)s")
    parser.add_argument("--png", type=Path, default=Path(PICTURE.name), help="default: %(default)s")
    parser.add_argument("--record", action="store_true", help="into the repository's own files")
    given = parser.parse_args(arguments)
    if given.record:
        given.json, given.png = RESULT, PICTURE
    models = [measure(run, given.data_dir, given.images, given.repeats) for run in given.runs]
    given.json.write_text(json.dumps({"models": models, **environment()}, indent=1) + "\n")
    draw(given.png, models)
    print(f"{given.json}, {given.png}")


if __name__ == "__main__":
    main()
