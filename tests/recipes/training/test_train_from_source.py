"""`train --source`: a run that begins with a pretrained ViT, and one without a tape."""

import dataclasses
import json

import pytest
import torch
from checks import refused
from image_files import write_mnist
from safetensors.torch import save_file
from tiny_training import exit_code

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.source_file import SourceFile, timm_tensors
from adatape_kernels.recipes.training.train_config import TrainConfig

DIM, DEPTH, HEADS, HIDDEN, PATCH = 16, 2, 2, 24, 14
TRAINING = ["--epochs", "1", "--batch", "20", "--bank-patch", "7", "--topk", "2"]
TRAINING += ["--num-tape-tokens", "3"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(recipe, "write_report", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder, train=40, test=10)
    return folder


def vit(classes=10, channels=1, class_token=True):
    """A plain ViT, with a head that is not zero."""
    model = ak.models.adatape_vit(
        f"Ti/{PATCH}",
        **{"dim": DIM, "depth": DEPTH, "num_heads": HEADS, "ffn_dim": HIDDEN, "image_size": 28},
        **{"in_channels": channels, "num_classes": classes, "activation": "gelu"},
        **{"bank": "learn", "read_layers": (), "bank_patch_size": 7},
        **({} if class_token else {"pooling": "mean", "query": "gap"}),
    )
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def torchvision_tensors(model):
    """The same by torchvision's names."""
    found = {}
    for name, tensor in timm_tensors_with_token(model).items():
        for former, latter in (
            ("blocks.", "encoder.layers.encoder_layer_"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv.", "self_attention.in_proj_"),
            ("attn.proj", "self_attention.out_proj"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.3"),
            ("patch_embed.proj", "conv_proj"),
            ("pos_embed", "encoder.pos_embedding"),
            ("cls_token", "class_token"),
            ("head.", "heads.head."),
        ):
            name = name.replace(former, latter)
        found[name.replace("norm.", "encoder.ln.") if name.startswith("norm.") else name] = tensor
    return found


def timm_tensors_with_token(model):
    found = timm_tensors(model)
    return {
        **{n: t for n, t in found.items() if n != "class_token"},
        "cls_token": model.class_token,
    }


@pytest.fixture
def file(tmp_path):
    def write(tensors, name="vit.safetensors"):
        save_file({n: t.detach().clone() for n, t in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


def words(mnist, out, *more):
    return ["train", "--data", "mnist", "--data-dir", str(mnist), "--out", str(out), *more]


@pytest.mark.parametrize("names", ["timm", "timm without a class token", "torchvision"])
def test_a_source_has_the_same_logits_until_something_is_read(file, names):
    model = vit(class_token="without" not in names)
    write = {"timm": timm_tensors_with_token, "torchvision": torchvision_tensors}
    source = SourceFile.read(file(write.get(names, timm_tensors)(model)), heads=HEADS)
    images = torch.randn(3, 1, 28, 28)
    for options in ({"num_tape_tokens": 0}, {"bank": "input"}, {"bank": "learn"}):
        config = TrainConfig.of({"data": "mnist", **options}, source)
        assert (config.dim, config.depth, config.ffn, config.patch) == (DIM, DEPTH, HIDDEN, PATCH)
        made = config.model(10, 1, source).eval()
        assert (made(images).tape_lens > 0).all() == (options != {"num_tape_tokens": 0})
        unread = source.model(dataclasses.replace(made.config, halt_threshold=0.0)).eval()
        assert torch.allclose(unread(images).logits, model(images).logits, atol=1e-5)
    assert TrainConfig.of({"data": "mnist"}, source).model(7, 1, source).head.weight.shape[0] == 7


def test_a_run_begins_with_a_source_and_resumes_without_it(file, mnist, tmp_path, capsys):
    source = file(timm_tensors_with_token(vit()))
    out = tmp_path / "run"
    start = [*words(mnist, out), "--source", str(source), "--heads", str(HEADS), *TRAINING]
    assert main(start) == 0
    saved = checkpoint.load(out)
    assert saved.config["source"]["pooling"] == "token" and saved.config["lr"] == 5e-4
    assert saved.tensors["model.bank_embed.weight"].shape == (DIM, 1, 7, 7)
    loaded = ak.load(out)
    assert loaded.config.pooling == "token" and loaded.config.activation == "gelu"
    other = file(timm_tensors_with_token(vit()), "other.safetensors")
    resume = ["train", "--out", str(out), "--resume"]
    assert main([*resume, "--source", str(source), "--heads", str(HEADS)]) == 0
    capsys.readouterr()
    assert main([*resume, "--source", str(other)]) == 2
    error = capsys.readouterr().err
    assert "source: expected the file with SHA-256" in error and error.count("\n") == 1
    source.unlink()
    assert main(resume) == 0


@pytest.mark.parametrize("bank", ["learn", "none"])
def test_a_model_without_a_bank_of_patches_is_trained(mnist, tmp_path, bank):
    options = ["--num-tape-tokens", "0"] if bank == "none" else ["--bank", "learn"]
    sizes = ["--patch", "14", "--dim", "16", "--depth", "1", "--heads", "2", "--ffn", "16"]
    training = ["--epochs", "1", "--batch", "20"]
    assert main([*words(mnist, tmp_path / "run"), *training, *sizes, *options]) == 0
    model = ak.load(tmp_path / "run")
    assert model.config.read_layers == (() if bank == "none" else (0,))
    assert not any(name.startswith("bank") for name in model.state_dict())


REFUSED = {
    "no file": (None, [], "source: expected a safetensors file"),
    "no heads": ({}, ["--heads", ""], "heads: expected the number of the source's"),
    "not a ViT": ({"conv1.weight": torch.zeros(2)}, [], "expected the tensors of a ViT"),
    "another width": ({}, ["--dim", "32"], "dim: expected 16, as in"),
    "a variant": ({}, ["--variant", "Ti/14"], "variant: expected none, as in"),
    "other heads": ({}, ["--heads", "3"], "heads: expected a divisor of dim = 16, got 3"),
    "three channels": ({"channels": 3}, [], "in_channels: expected 3, as in the source, got 1"),
    "an unknown bank": ({}, ["--bank", "river"], "bank: expected 'input' or 'learn'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_does_not_fit_is_one_line(file, mnist, tmp_path, capsys, case):
    given, more, expected = REFUSED[case]
    path = tmp_path / "absent.safetensors"
    if given is not None:
        options = {k: v for k, v in given.items() if k == "channels"}
        tensors = given if given.keys() - options else timm_tensors_with_token(vit(**options))
        path = file(tensors)
    heads = [] if "--heads" in more else ["--heads", str(HEADS)]
    more = [] if case == "no heads" else more
    command = [*words(mnist, tmp_path / "run"), "--source", str(path), *heads, *TRAINING, *more]
    assert exit_code(command) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_a_model_of_ours_is_no_source(tmp_path):
    path = ak.save(vit(), tmp_path / "ours.safetensors")
    with refused("source", "a model of adatape-kernels"):
        SourceFile.read(path, heads=HEADS)


def test_facts_of_a_source_are_checked_where_they_are_read(file):
    source = SourceFile.read(file(timm_tensors_with_token(vit())), heads=HEADS)
    saved = json.loads(json.dumps(vars(TrainConfig.of({"data": "mnist"}, source)), default=vars))
    assert TrainConfig.of_saved(saved).source == source.facts
    for name in saved["source"]:
        for value in (None, [], "x", -1, {}):
            changed = {**saved, "source": {**saved["source"], name: value}}
            with pytest.raises((ValueError, TypeError), match=f"{name.split('_')[0]}|source"):
                TrainConfig.of_saved(changed)
    for value in ("x", 5, {}, {**saved["source"], "more": 1}):
        with refused("source"):
            TrainConfig.of_saved({**saved, "source": value})


def test_a_split_does_not_change_with_the_seed():
    seeds = [TrainConfig.of({"data": "digits", "seed": s, "split_seed": 7}).split for s in (0, 1)]
    assert seeds == [7, 7]
    assert TrainConfig.of({"data": "digits", "seed": 3}).split == 3
