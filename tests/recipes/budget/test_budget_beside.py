"""The command `budget` on two runs: which figures are whose, what is refused, what is drawn."""

import json
import shutil
from dataclasses import replace

import pytest
from checks import refused
from matplotlib.backends.backend_agg import FigureCanvasAgg

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes import adatape_runs, checkpoint, pictures
from adatape_kernels.recipes.budget.budget_picture import figure_of
from adatape_kernels.recipes.budget.budget_result import BudgetResult
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import accuracy, predict

NAME = "Ba$$in 图像"


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """A run, one of another model, one on other test images, and a ViT that reads nothing."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (
        ("first", {}),
        (NAME, {}),
        ("other", {"split_seed": 5}),
        ("vit", {"num_tape_tokens": 0}),
    ):
        copy_with(run, folder / name, options)
    return folder


def copy_with(run, copied, options):
    """Copy a run as one of other options, with a model of its own."""
    shutil.copytree(run, copied)
    index = json.loads((run / checkpoint.INDEX).read_text())
    index["config"] |= options
    (copied / checkpoint.INDEX).write_bytes(checkpoint.sealed(index))
    (copied / "model.safetensors").unlink()
    model, trained = TrainConfig.of_saved(index["config"]).model(10, 1), ak.load(run)
    ak.save(model, copied, class_names=trained.class_names, preprocessing=trained.preprocessing)


def test_each_line_is_of_the_run_that_it_names(runs, tmp_path, capsys):
    limits = ["--thresholds", "1,2", "--max-tape", "2", "--rounds", "1"]
    beside = ["--beside", str(runs / NAME)]
    assert (
        main(["budget", str(runs / "first"), *beside, *limits, "--out", str(tmp_path / "b")]) == 0
    )
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    found = [(r["run"], r["halt_threshold"], r["num_tape_tokens"]) for r in report["results"]]
    assert found == [(run, threshold, 2) for run in ("first", NAME) for threshold in (1.0, 2.0)]
    assert report["run"] == "first" and [each["run"] for each in report["beside"]] == [NAME]
    assert report["beside"][0]["own"] == report["own"]
    assert [line.split()[0] for line in printed.splitlines()[1:6]] == [
        "run", "first", "first", "Ba$$in", "Ba$$in",
    ]  # fmt: skip
    data = images_of_run(runs / "first")
    for result in report["results"]:
        model = ak.load(runs / result["run"])
        limits = {name: result[name] for name in ("halt_threshold", "num_tape_tokens")}
        output = predict(model, data.test_images, normaliser_of(model), **limits)
        assert result["accuracy"] == accuracy(output, data.test_labels)
        assert result["mean_tape_tokens"] == output.tape_lens.double().mean().item()


@pytest.mark.parametrize(
    "beside, words",
    [
        (["first"], ["beside: expected other runs, got", "first again"]),
        ([NAME, NAME], ["beside: expected other runs, got", "again"]),
        (["other"], ["beside: expected a run on the test images of first, got", "other"]),
        (["vit"], ["beside: expected that of an AdaTape of images that reads, got", "vit"]),
        (["none"], ["none", "which is not there"]),
    ],
)
def test_refusals_are_one_line(runs, tmp_path, capsys, beside, words):
    out = tmp_path / "b"
    folders = [str(runs / name) for name in beside]
    assert main(["budget", str(runs / "first"), "--beside", *folders, "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line
    assert not out.exists()


def test_runs_whose_folders_are_called_alike_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert adatape_runs.names_of_runs(folders) == [str(folders[0]), str(folders[1]), "c"]
    with refused("beside", "again"):
        adatape_runs.names_of_runs([tmp_path / "a", tmp_path / "b" / ".." / "a"])


RESULT = BudgetResult("run", 1.0, 8, 0.5, 2.0, 18.0, 5e6, 1000.0, (900.0, 1100.0))


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name, runs_drawn", [("$x", 1), (NAME, 2), ("W" * 60, 7), ("\n\u202e", 2)])
def test_the_legend_is_whole_and_names_each_line(name, runs_drawn):
    results = [
        replace(RESULT, run=f"{number}{name}", halt_threshold=threshold, accuracy=threshold / 9)
        for number in range(runs_drawn)
        for threshold in (1.0, 2.0)
    ]
    with pictures.plain_settings():
        figure = figure_of(results)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent(canvas.get_renderer())
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(set(texts)) == runs_drawn
    assert all(not text.get_parse_math() for text in legend.get_texts())
    for axis in figure.axes:
        assert not box.overlaps(axis.xaxis.label.get_window_extent(canvas.get_renderer()))
        looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
        assert len(looks) == runs_drawn
