import csv
import json
from dataclasses import asdict

import pytest
from checks import assert_same_bits, refused
from image_files import write_folder

from adatape_kernels.data import Normaliser, load
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.loading_options import LOADING_OPTIONS, Loading, with_draws
from adatape_kernels.recipes.training.train_config import TrainConfig

pytest.importorskip("PIL", reason="image folders need Pillow")

TINY = {"patch": 8, "bank_patch": 4, "dim": 8, "depth": 1, "heads": 1, "ffn": 8, "topk": 2}
TINY |= {"num_tape_tokens": 2, "image_size": 8, "batch": 5, "epochs": 2}
FOLDER = {"data": "imagefolder", **TINY}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Leaves out the report, which takes seconds and which other tests look at."""
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    write_folder(folder / "train", count=6)
    write_folder(folder / "val", count=2)
    return folder


def curve(out):
    with open(out / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{**row, "images_per_second": None} for row in rows]


def interrupt(row, epochs):
    raise KeyboardInterrupt


def test_a_run_goes_on_with_another_number_of_workers(photos, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe.run(whole, {**FOLDER, "mixup": 0.2}, data_dir=photos)
    assert "; the loader alone " in capsys.readouterr().out
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "epoch_line", interrupt)
        recipe.run(broken, {**FOLDER, "mixup": 0.2}, data_dir=photos)
    assert len(curve(broken)) == 1
    recipe.run(broken, {}, resume=True, loading={"workers": 1, "look": "none"})
    assert curve(broken) == curve(whole) and len(curve(whole)) == 2
    ours, theirs = (checkpoint.load(folder) for folder in (broken, whole))
    for name, tensor in theirs.tensors.items():
        assert_same_bits(ours.tensors[name], tensor)
    assert ours.environment["workers"] == 1 and ours.environment["look"] == "none"
    assert "differ in the last bits" not in capsys.readouterr().err


def test_a_run_that_draws_by_epoch_goes_on_so(photos, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {**FOLDER, "draws": "epoch"}
    recipe.run(whole, options, data_dir=photos)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "epoch_line", interrupt)
        recipe.run(broken, options, data_dir=photos)
    with refused("workers", "0 for a run that began without", "got 2"):
        recipe.run(broken, {}, resume=True, loading={"workers": 2})
    recipe.run(broken, {}, resume=True)
    assert curve(broken) == curve(whole)


def test_saved_runs_without_these_options_draw_by_epoch():
    saved = asdict(TrainConfig.of(FOLDER))
    for name in LOADING_OPTIONS:
        del saved[name]
    found = TrainConfig.of_saved(saved)
    assert (found.draws, found.unreadable) == ("epoch", "stop")


def test_what_new_runs_draw_from():
    assert with_draws({"data": "digits"}, {})["draws"] == "epoch"
    assert with_draws({"data": "digits"}, {"workers": 0})["draws"] == "image"
    assert with_draws({"data": "shards"}, {"workers": None})["draws"] == "image"


@pytest.mark.parametrize("look", ["all", "test"])
def test_unreadable_images_are_skipped_and_counted(photos, tmp_path, capsys, look):
    bad = [photos / half / "dog" / "1.jpg" for half in ("train", "val")]
    for file in bad:
        file.write_bytes(file.read_bytes()[:50])
    out = tmp_path / "run"
    options = {**FOLDER, "unreadable": "skip"}
    recipe.run(out, options, data_dir=photos, loading={"look": look})
    said = capsys.readouterr().err
    for kind, file in (("training", bad[0]), ("test", bad[1])):
        assert f"note: skipped 1 {kind} images that cannot be read: {file}" in said
    facts = json.loads((out / "checkpoint.json").read_text())["data"]
    assert facts["train_images"] == (11 if look == "all" else 12) and facts["test_images"] == 3
    with refused("unreadable-limit", "at most 0", str(bad[1])):
        limited = {**options, "unreadable_limit": 0}
        recipe.run(tmp_path / "other", limited, data_dir=photos, loading={"look": look})
    assert not (tmp_path / "other").exists()


def test_an_unreadable_image_that_was_not_looked_at_stops_the_epoch(photos, tmp_path, monkeypatch):
    data = load("imagefolder", photos, image_size=8)
    assert len(data.train_labels) == 12
    monkeypatch.setattr(Normaliser, "of", lambda images: Normaliser((0.5,), (0.2,)))
    monkeypatch.setattr(TrainConfig, "model", model_of_one_channel)
    bad = photos / "train" / "dog" / "5.jpg"  # beyond those that try a step
    bad.write_bytes(bad.read_bytes()[:50])
    with refused(str(bad), "whole JPEG"):
        recipe.run(tmp_path / "run", FOLDER, data_dir=photos, loading={"look": "none"})


def model_of_one_channel(config, num_classes, channels, source):
    return super(TrainConfig, config).model(num_classes, 3, source)


def test_options_that_do_not_fit_are_refused_before_data_is_read(tmp_path):
    with refused("unreadable", "stop for digits"):
        recipe.run(tmp_path / "run", {"data": "digits", "unreadable": "skip"})
    with refused("look", "all or test", "none"):
        options = {**FOLDER, "unreadable": "skip"}
        recipe.run(tmp_path / "run", options, data_dir=tmp_path, loading={"look": "none"})
    with refused("workers", "1024", "2000"):
        Loading(workers=2000)
    with refused("look", "'all' or 'test'", "'some'"):
        Loading(look="some")
    with refused("loading", "workers, look", "'worker'"):
        Loading.of_run({"worker": 1})
    with refused("unreadable", "stop", "drop"):
        TrainConfig.of({**FOLDER, "unreadable": "drop"})
    with refused("unreadable-limit", "0", "-1"):
        TrainConfig.of({**FOLDER, "unreadable_limit": -1})
