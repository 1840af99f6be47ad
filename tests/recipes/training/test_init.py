"""`train --init`: a run that begins with a model of this package."""

import json

import pytest
import torch
from checks import assert_same_bits, refused
from image_files import write_mnist
from safetensors.torch import save_file
from tiny_training import TINY, assert_same_run, curve, stop_after

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.model_tensors import below
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.initial_model import InitialModel
from adatape_kernels.recipes.training.source_file import sha256_of
from adatape_kernels.recipes.training.train_config import TrainConfig

NAMES = tuple(map(str, range(10)))
SIZES = {"dim": 8, "depth": 1, "num_heads": 2, "ffn_dim": 8}
SIZES |= {"image_size": 28, "in_channels": 1, "num_classes": 10}
TAPE = {"bank_patch_size": 7, "num_tape_tokens": 2, "topk": 2}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    def write(out, model, *given, **options):
        out.write("model.safetensors", ak.models.model_file.serialised(model))

    monkeypatch.setattr(recipe, "write_report", write)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init_mnist")
    write_mnist(folder, train=40, test=10)
    return folder


@pytest.fixture(scope="module")
def first(mnist, tmp_path_factory):
    """A run whose average differs from its parameters."""
    out = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "write_report", lambda *given, **options: None)
        options = {**TINY, "ema": 0.9, "lr": 0.01, "halt_threshold": 1.5, "activation": "relu"}
        recipe.run(out, options, data_dir=mnist)
    return out


def model_of(config, start, classes=10):
    model = config.model(classes, 1)
    start.put_into(model, NAMES[:classes])
    return model.eval()


def begun_with(path, **options):
    start = InitialModel.read(path)
    given = {"data": "mnist", **options}
    return TrainConfig.of(start.options(given), usual=start.own_options(given)), start


def words(mnist, out, path, *more):
    start = ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out)]
    return [*start, "--init", str(path), *more]


@pytest.mark.parametrize("kind", ["unfinished", "finished", "best", "file"])
def test_a_run_begins_with_the_parameters(first, mnist, tmp_path, monkeypatch, kind):
    model = ak.load(first / "best.safetensors" if kind == "best" else first)
    path, held = first, first / "checkpoint.json"
    if kind == "finished":
        path, held = tmp_path / "done", tmp_path / "done" / "model.safetensors"
        ak.save(model, path)
    elif kind == "best":
        path = held = first / "best.safetensors"
    elif kind == "file":
        path = held = ak.save(model, tmp_path / "some.safetensors")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(out, {"data": "mnist", "batch": 20}, data_dir=mnist, init=path)
    saved = checkpoint.load(out)
    found, expected = below(saved.tensors, "model."), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
    facts = saved.config["init"]
    assert (facts["name"], facts["sha256"]) == (path.name, sha256_of(held))
    # Its own sizes and choices are the defaults, and the learning rate is that of fine-tuning.
    for name, value in {"dim": 8, "halt_threshold": 1.5, "activation": "relu", "lr": 5e-4}.items():
        assert saved.config[name] == value
    assert ak.load(out).config == model.config


def test_a_run_resumes_without_what_it_began_with(first, mnist, tmp_path, monkeypatch, capsys):
    file = ak.save(ak.load(first), tmp_path / "some.safetensors")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(words(mnist, whole, file, "--epochs", "2", "--batch", "20")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(words(mnist, out, file, "--epochs", "2", "--batch", "20")) == 130
    resume = ["train", "--out", str(out), "--resume"]
    assert main([*resume, "--init", str(file)]) == 0
    assert curve(out) == curve(whole)
    file.unlink()
    assert main(resume) == 0
    capsys.readouterr()
    assert main([*resume, "--init", str(first)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adatape-kernels: init: expected the file with SHA-256 ")
    assert main(["train", "--out", str(first), "--resume", "--init", str(out)]) == 2
    assert "init: expected none, as in" in capsys.readouterr().err


def test_what_its_folder_records_gives_its_curve_again(first, mnist, tmp_path):
    recipe.run(tmp_path / "one", {"data": "mnist", "epochs": 1}, data_dir=mnist, init=first)
    config = json.loads((tmp_path / "one" / checkpoint.INDEX).read_text())["config"]
    assert config.pop("init")["name"] == first.name
    recipe.run(tmp_path / "other", config, data_dir=mnist, init=first)
    assert_same_run(tmp_path / "one", tmp_path / "other")


def models():
    vit = ak.models.adatape_vit
    yield vit("Ti/14", **SIZES, **TAPE)
    yield vit("Ti/14", **SIZES, **TAPE, pooling="mean", query="gap", norm_after_pooling=True)
    yield vit("Ti/14", **SIZES, **TAPE, num_registers=2, norm_eps=1e-3, tape_ffn_dim=4)
    yield vit("Ti/14", **SIZES, bank="learn", bank_size=7, num_tape_tokens=3, topk=1)
    yield vit("Ti/14", **SIZES, bank="learn", read_layers=())
    for name, more in (
        ("vit", {"pre_norm": True}),
        ("uvit", {"act_epsilon": 0.3, "halting_bias_init": -0.5}),
        ("u2t", {"depth": 3}),
        ("avit", {"gate_center": 1.0, "keep_class_token": True}),
    ):
        name = f"{name}_tiny_patch16_224"
        yield ak.models.create_model(name, **{**SIZES, "patch_size": 7, **more})


@pytest.mark.parametrize("number", range(9))
def test_a_model_of_every_kind_computes_the_same(tmp_path, number):
    torch.manual_seed(number)
    model = [*models()][number].eval()
    torch.nn.init.normal_([*model.head.parameters()][-2])
    config, start = begun_with(ak.save(model, tmp_path / "model.safetensors"))
    begun = model_of(config, start)
    assert begun.config == model.config or not getattr(model.config, "read_layers", True)
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert_same_bits(begun(images).logits, model(images).logits)
    saved = json.loads(json.dumps({**vars(config), "init": vars(config.init)}))
    assert TrainConfig.of_saved(saved) == config


def test_another_number_of_classes_gets_a_new_head(first, mnist, tmp_path, capsys):
    config, start = begun_with(first)
    begun = model_of(config, start, classes=4)
    assert "note: " in (said := capsys.readouterr().err)
    assert "has 10 classes and the images 4: the head is new" in said
    assert begun.head.weight.shape == (4, 8)
    for name, tensor in begun.state_dict().items():
        if not name.startswith("head."):
            assert_same_bits(tensor, start.tensors[name])
    named = ak.save(ak.load(first), tmp_path / "named", class_names=[f"dress {n}" for n in NAMES])
    config, start = begun_with(named)
    assert_same_bits(model_of(config, start).head.weight.detach(), start.tensors["head.weight"])
    assert "has other names for its 10 classes" in capsys.readouterr().err
    model_of(*begun_with(first))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--dim", "16"], ("bank_embed.bias", "(16,)", "(8,)")),
        (["--patch", "7"], ("patch_embed.weight", "(8, 1, 7, 7)", "(8, 1, 14, 14)")),
        (["--ffn", "16"], ("linear1.bias", "(16,)", "(8,)")),
        (["--depth", "2"], ("encoder.layers.1.", "got none")),
        (["--bank", "learn", "--bank-size", "5"], ("bank", "got ")),
        (["--variant", "Ti/14"], ("bank_embed.bias", "(192,)", "(8,)")),
        (["--heads", "4"], ("heads: expected 2, as in", "got 4")),
        (["--activation", "gelu"], ("activation: expected relu, as in", "got gelu")),
        (["--model", "uvit"], ("model: expected adatape, as in", "got 'uvit'")),
        (["--source", "vit.safetensors"], ("init: expected none beside --source",)),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_no_folder(
    first, mnist, tmp_path, capsys, more, expected
):
    out = tmp_path / "run"
    assert main(words(mnist, out, first, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    for word in expected:
        assert word in error, error
    assert str(first) in error or "--source" in error


def test_images_of_another_size_are_named_by_the_parameter(tmp_path):
    small = ak.models.adatape_vit("Ti/14", **{**SIZES, "image_size": 14}, **TAPE)
    file = ak.save(small, tmp_path / "small")
    config, start = begun_with(file)
    with refused(file, "bank_position", "(1, 16, 8)", "(1, 4, 8)"):
        model_of(config, start)


def test_what_is_no_model_of_images_is_one_line(first, mnist, tmp_path, capsys):
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(3)}, plain)
    parity = ak.models.create_model("adatape_parity_tiny", dim=8, depth=1, num_heads=2, ffn_dim=8)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((first / "best.safetensors").read_bytes()[:-9])
    for path, expected in (
        (tmp_path / "nowhere", "init: expected a file or a folder"),
        (tmp_path, "init: expected a folder with model.safetensors or checkpoint.json"),
        (plain, "expected a model's configuration in the file's metadata"),
        (cut, "expected a whole safetensors file"),
        (ak.save(parity, tmp_path / "parity"), "init: expected a model of images"),
    ):
        assert main(words(mnist, tmp_path / "run", path)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error and str(path) in error, error
    for value, error in ((5, TypeError), ("", ValueError), ("a\0b", ValueError)):
        with refused("init", error=error):
            recipe.run(tmp_path / "run", {"data": "mnist"}, data_dir=mnist, init=value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "altered",
    [
        5,
        {"name": "a"},
        {"sha256": "x"},
        {"name": 3},
        {"fields": None},
        {"fields": {"dim": 4}},
        {"fields": {"num_classes": 4}},
        {"fields": {"colour": 4}},
        {"fields": {"norm_eps": "small"}},
        {"fields": {3: 4}},
        {"more": 1},
    ],
)
def test_altered_facts_are_refused(first, altered):
    config, _ = begun_with(first)
    facts = dict(vars(config.init))
    if isinstance(altered, dict):
        facts = {"sha256": facts["sha256"]} if altered == {"name": "a"} else {**facts, **altered}
    else:
        facts = altered
    with pytest.raises(ValueError, match=r"^[\w-]+: expected .*, got "):
        TrainConfig.of_saved({**vars(config), "init": facts})
    with refused("init", "none beside a source"):
        TrainConfig.of_saved({**vars(config), "init": vars(config.init), "source": {}})
