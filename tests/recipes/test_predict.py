"""Models of runs, finished or not, of this version or 0.1, and what `predict` prints of images."""

import json

import numpy as np
import pytest
import torch
from checkpoints import in_format_1
from checks import assert_same_bits
from safetensors.torch import load_file, save_file

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, digits
from adatape_kernels.recipes import checkpoint, demo

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
TINY = ["--image-size", "16", "--patch", "8", "--bank-patch", "4", "--dim", "16", "--depth", "1"]
TINY += ["--heads", "2", "--ffn", "16", "--num-tape-tokens", "3", "--topk", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, shade in (("Ba$$in", 40), ("läufe", 200)):
        (folder / name).mkdir()
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 50, (20, 24, 3)) + shade
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", "--data", "imagefolder", "--data-dir", str(photos), "--out", str(out)]
    assert main([*arguments, *TINY]) == 0
    return out


def logits_of_training(run, photos):
    """The first image's logits as training computed them."""
    saved = checkpoint.load(run)
    file = photos / "Ba$$in" / "0.png"
    model = ak.load(run)
    pixels = np.asarray(Image.open(file).resize((16, 16)))  # of the right size, not the right bits
    assert pixels.shape == (16, 16, 3)
    normalise = Normaliser(tuple(saved.data["mean"]), tuple(saved.data["std"]))
    from adatape_kernels.data.image_file import decode

    with torch.no_grad():
        return model(normalise(decode(file, 16).unsqueeze(0) / 255)).logits


def test_a_run_gives_its_model_names_and_preprocessing(run, photos):
    model = ak.load(run)
    assert model.class_names == ("Ba$$in", "läufe")
    assert model.preprocessing.image_size == 16 and model.preprocessing.channels == 3
    saved = checkpoint.load(run).tensors
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, saved[f"model.{name}"])
    with torch.no_grad():
        logits = model(model.preprocessing.file(photos / "Ba$$in" / "0.png")).logits
    assert_same_bits(logits, logits_of_training(run, photos))


def test_a_run_that_has_not_finished(run, tmp_path):
    for file in run.glob("checkpoint*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, finished = ak.load(tmp_path), ak.load(run)
    assert model.config == finished.config and model.class_names == finished.class_names
    assert model.preprocessing == finished.preprocessing
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, finished.state_dict()[name])


def test_a_run_of_version_0_1(run, tmp_path):
    save_file(load_file(run / "model.safetensors"), tmp_path / "model.safetensors")
    report = json.loads((run / "report.json").read_text())
    options = report["config"]
    for name in ("drop_rest", "activation"):
        del options[name]
    options["tape"], options["threshold"] = (
        options.pop(name) for name in ("num_tape_tokens", "halt_threshold")
    )
    (tmp_path / "report.json").write_text(json.dumps(report))
    model, expected = ak.load(tmp_path), ak.load(run)
    assert model.config == expected.config and model.preprocessing == expected.preprocessing
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match=r"report.json: expected the report of a run"):
        ak.load(tmp_path)


def test_an_unfinished_run_of_version_0_1(run, tmp_path):
    for file in run.glob("checkpoint*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "checkpoint.json"
    index.write_bytes(in_format_1(json.loads(index.read_bytes())))
    assert ak.load(tmp_path).config == ak.load(run).config


def test_a_demo_of_version_0_1(tmp_path):
    model = ak.models.AdaTapeViT(demo.CONFIG)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "report.json").write_text('{"epochs": 1, "seed": 3}')
    found = ak.load(tmp_path)
    normalise = Normaliser.of(digits(3).train_images)
    assert found.config == demo.CONFIG and found.preprocessing.mean == normalise.mean
    assert found.class_names == tuple("0123456789")


def test_predict_prints_a_line_an_image(run, photos, capsys):
    files = [str(photos / name / "1.png") for name in ("Ba$$in", "läufe")]
    assert main(["predict", str(run), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, file in zip(lines, files, strict=True):
        assert line.startswith(f"{file}: ") and "tape token" in line and line.endswith(" ms)")
        assert "Ba$$in" in line and "läufe" in line and "%" in line


def test_predict_in_json_and_with_a_threshold(run, photos, capsys):
    file = str(photos / "läufe" / "1.png")
    found = []
    for more in ([], ["--threshold", "0.01"], ["--threshold", "9"]):
        assert main(["predict", str(run), file, "--json", "--top", "1", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert all(set(f) == {"file", "top", "tape_tokens", "milliseconds"} for f in found)
    assert [f["tape_tokens"] for f in found[1:]] == [1, 3]
    assert len(found[0]["top"]) == 1 and set(found[0]["top"][0]) == {"class", "probability"}


def test_predict_goes_on_after_a_file_that_is_no_image(run, photos, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    good = str(photos / "läufe" / "1.png")
    assert main(["predict", str(run), str(tmp_path / "no.png"), "missing.png", good]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(good) and len(out.splitlines()) == 1
    assert [("no.png" in line, "missing.png" in line) for line in err.splitlines()] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--threshold", "nan"], "halt_threshold"),
        (["--top", "0"], "top"),
        (["--device", "tpu"], "device"),
        (["--backend", "magic"], "backend"),
    ],
)
def test_predict_refuses_in_one_line(run, photos, capsys, more, word):
    assert main(["predict", str(run), str(photos / "läufe" / "1.png"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_predict_needs_preprocessing_and_a_model(tmp_path, capsys):
    ak.save(ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=2), tmp_path / "m")
    for source, word in ((tmp_path / "m", "preprocessing"), (tmp_path, "model.safetensors")):
        assert main(["predict", str(source), "a.png"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert word in line


def test_grey_images_of_colours(tmp_path):
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "red.png")
    preprocess = ak.data.Preprocessing(8, 1, (0.0,), (1.0,))
    image = preprocess.file(tmp_path / "red.png")
    assert image.shape == (1, 1, 8, 8) and (image * 255).unique().tolist() == [76.0]
