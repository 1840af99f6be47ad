"""The recipe of ImageNet, all of it, on a drawn miniature in ImageNet's layout and its shards."""

import csv
import json
import math

import pytest
import torch
from checks import assert_same_bits, refused

from adatape_kernels.cli import main
from adatape_kernels.data import load, shard_writer
from adatape_kernels.data.image_file import pillow
from adatape_kernels.data.imagenet_miniature import SIDES, SYNSETS, write_miniature
from adatape_kernels.data.loading import read_ahead
from adatape_kernels.data.shard_writer import write_shards
from adatape_kernels.recipes import checkpoint, pictures
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.named_recipes import recipe_values
from adatape_kernels.recipes.training.run_record import RunRecord

pytest.importorskip("PIL", reason="the miniature is made of JPEG files, which need Pillow")

SMALL = {"image-size": 32, "dim": 16, "depth": 2, "heads": 2, "ffn": 16, "patch": 16}
SMALL |= {"epochs": 1, "batch": 8, "warmup-share": 0.3}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    write_miniature(folder / "images", train=4, val=1)
    write_shards(folder / "images", folder / "shards", images=7)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Draws no pictures and times once, which other tests look at."""
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(pictures, "draw_all", lambda *given: None)


def trained(kind, folder, out, *more):
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    paths = ["--data-dir", str(folder), "--out", str(out)]
    words = ["train", *kind, *paths, *options, *more]
    assert main(words) == 0
    with open(out / "metrics.csv", newline="") as stream:
        return [{**row, "images_per_second": None} for row in csv.DictReader(stream)]


def test_the_layout_and_the_kinds_of_images_are_imagenet_s(miniature):
    image_module, _ = pillow()
    folder = miniature / "images"
    assert sorted(path.name for path in (folder / "train").iterdir()) == sorted(SYNSETS)
    files = sorted(folder.glob("*/*/*"))
    assert len(files) == len(SYNSETS) * 5 and {file.suffix for file in files} == {".JPEG"}
    modes, sizes, turned = set(), set(), 0
    for file in files:
        with image_module.open(file) as image:
            modes.add(image.mode)
            sizes.add(image.size)
            turned += image.getexif().get(0x0112) == 6
    assert modes == {"L", "CMYK", "RGB"} and turned == 1 and sizes >= {*SIDES}
    again = miniature / "again"
    write_miniature(again, train=4, val=1)
    for file in files:
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_shards_hold_the_images_of_the_folders(miniature, tmp_path):
    sets = {name: miniature / name for name in ("images", "shards")}
    folders = load("imagefolder", sets["images"], image_size=16)
    shards = load("shards", sets["shards"], image_size=16)
    assert shards.class_names == folders.class_names == tuple(sorted(SYNSETS))
    for half in ("train", "test"):
        ours, theirs = (getattr(data, f"{half}_labels") for data in (shards, folders))
        assert torch.equal(ours, theirs)
        every = torch.arange(len(ours))
        ours, theirs = (getattr(data, f"{half}_images")[every] for data in (shards, folders))
        assert torch.equal(ours, theirs)
    assert len(list((sets["shards"] / "train").glob("*.tar"))) == 3
    with refused("out", "empty folder"):
        write_shards(sets["images"], sets["shards"])
    assert shard_writer.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2


def test_the_whole_recipe_trains_on_folders_and_on_shards(miniature, tmp_path, quick, monkeypatch):
    pytest.importorskip("kornia", reason="RandAugment, which the recipe asks for, needs kornia")
    monkeypatch.setattr(read_ahead, "_ASKED", 1)  # so that workers have something to share
    outs = tmp_path / "folders", tmp_path / "shards"
    curve = trained(["--config", "imagenet-s16.yaml"], miniature / "images", outs[0])
    monkeypatch.setattr(train, "write_report", lambda *given, **options: None)
    monkeypatch.setattr(RunRecord, "end", lambda record: None)
    kind = ["--recipe", "imagenet", "--data", "shards"]
    assert trained(kind, miniature / "shards", outs[1], "--workers", "2") == curve
    assert len(curve) == 1 and all(math.isfinite(float(row["train_loss"])) for row in curve)
    saved, other = (checkpoint.load(out) for out in outs)
    for name, tensor in saved.tensors.items():
        assert_same_bits(other.tensors[name], tensor)
    values = recipe_values("imagenet", "imagefolder")
    for name in ("loss", "mixup", "randaugment", "randaugment_magnitude", "max_grad_norm"):
        assert saved.config[name] == values[name]
    assert json.loads((outs[0] / "report.json").read_text())["data"]["train_images"] == 16
