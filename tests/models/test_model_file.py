"""What `save` writes and `load` reads: the same model, or one line that says what is wrong."""

import json
import random
import struct
from dataclasses import replace

import pytest
import torch
from checks import assert_same_bits, refused
from safetensors.torch import load_file, save_file

import adatape_kernels as ak
from adatape_kernels.data import Preprocessing
from adatape_kernels.models.model_file import read

OP = None
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage")
PARITY = dict(num_classes=2, dim=8, depth=1, num_heads=2, ffn_dim=8, seq_len=6, topk=2)
PREPROCESSING = Preprocessing(8, 3, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))


def vit(**options):
    torch.manual_seed(0)
    options = dict(image_size=8, dim=16, depth=2, num_heads=2, ffn_dim=16, num_classes=3) | options
    model = ak.models.adatape_vit("Ti/4", **options)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def outputs(model, dtype=torch.float32):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model(images)


@pytest.fixture
def file(tmp_path):
    return ak.save(vit(), tmp_path / "model.safetensors", class_names="abc")


def rewritten(file, change, checksum=True):
    """The file with other metadata; `change` is given the description's entries."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    entries = json.loads(header["__metadata__"]["adatape_kernels"])
    header["__metadata__"]["adatape_kernels"] = json.dumps(change(entries) or entries)
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bank="learn", bank_size=9, key_split=2, average_query=False, loss_type="max"),
        dict(pooling="mean", query="gap", tape_mlp_dim=8, read_layers=(0, 1), activation="relu"),
        dict(num_tape_tokens=3, topk=2, halt_threshold=0.5, read_layers=(1,), dropout=0.5),
        dict(read_layers=()),
    ],
)
def test_a_loaded_model_is_the_saved_one(tmp_path, options):
    model = vit(**options)
    found = ak.load(ak.save(model, tmp_path / "new" / "folder"))
    assert type(found) is type(model) and found.config == model.config
    assert not found.training and all(p.requires_grad for p in found.parameters())
    assert found.class_names is None and found.preprocessing is None
    for ours, theirs in zip(outputs(found).reads, outputs(model).reads, strict=True):
        assert_same_bits(ours.indices, theirs.indices)
    assert_same_bits(outputs(found).logits, outputs(model).logits)


def test_parity(tmp_path):
    model = ak.models.AdaTapeParity(ak.models.AdaTapeParityConfig(**PARITY)).eval()
    found = ak.load(ak.save(model, tmp_path))
    sequences = torch.nn.functional.one_hot(torch.arange(12).view(2, 6) % 3).float()
    assert_same_bits(found(sequences).logits, model(sequences).logits)


def test_names_and_preprocessing_come_along(tmp_path):
    names = ["Ba$$in", "läufe", "猫"]
    ak.save(vit(), tmp_path, class_names=names, preprocessing=PREPROCESSING)
    found = ak.load(tmp_path)
    assert found.class_names == tuple(names) and found.preprocessing == PREPROCESSING
    again = ak.load(ak.save(found, tmp_path / "again.safetensors"))
    assert again.class_names == tuple(names) and again.preprocessing == PREPROCESSING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = vit().to(dtype)
    file = ak.save(model, tmp_path)
    assert_same_bits(outputs(ak.load(file), dtype).logits, outputs(model, dtype).logits)
    wide = ak.load(file, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_training_goes_on(tmp_path):
    model = ak.load(ak.save(vit(), tmp_path)).train()
    model.loss(model(torch.rand(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_threshold(file):
    found = ak.load(file, halt_threshold=0.2)
    assert found.config.halt_threshold == 0.2
    assert outputs(found).tape_lens.sum() < outputs(ak.load(file)).tape_lens.sum()
    with refused("halt_threshold"):
        ak.load(file, halt_threshold=float("nan"))


def test_every_flipped_bit_is_noticed(tmp_path):
    file = ak.save(vit(depth=1), tmp_path / "model.safetensors", class_names="abc")
    content = file.read_bytes()
    rng = random.Random(0)
    (header,) = struct.unpack("<Q", content[:8])
    # Every byte before the tensors, once, and some of theirs.
    places = [*range(8 + header), *rng.sample(range(8 + header, len(content)), 300)]
    padding = len(content[8 : 8 + header].rstrip(b" ")) + 8
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        if padding <= place < 8 + header and changed[place : place + 1].isspace():
            continue  # blanks between the header and the tensors
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"model\.safetensors") as raised:
            ak.load(file)
        assert "\n" not in str(raised.value)


def test_every_cut_is_noticed(file):
    content = file.read_bytes()
    for length in [*range(0, 3000, 97), len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            ak.load(file)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda e: e.update(format=2), ["format of at most 1", "2", "newer"]),
        (lambda e: e.update(format=True), ["format", "True"]),
        (lambda e: e.update(format=0), ["format", "0"]),
        (lambda e: e.update(model="Nothing"), ["AdaTapeViT", "Nothing"]),
        (lambda e: e.update(config=None), ["configuration"]),
        (lambda e: e["config"].update(num_heads=0), ["num_heads", "0"]),
        (lambda e: e["config"].update(depth=10**30), ["depth"]),
        (lambda e: e["config"].update(colour=1), ["colour"]),
        (lambda e: e["config"].pop("dim") and None, ["dim"]),
        (lambda e: e.update(class_names=["a"]), ["3 class names", "1"]),
        (lambda e: e.update(class_names=7), ["int"]),
        (lambda e: e.update(preprocessing={"mean": []}), ["preprocessing"]),
        (lambda e: [1], ["format", "None"]),
    ],
)
def test_a_wrong_description_is_one_line(file, change, parts):
    rewritten(file, change)
    with pytest.raises(ValueError, match=r"model\.safetensors") as raised:
        ak.load(file)
    assert "\n" not in str(raised.value)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_tensors_of_another_model_are_named(file, tmp_path):
    tensors = load_file(file)
    tensors["head.weight"] = tensors["head.weight"][:2]
    del tensors["position"]
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    with pytest.raises(ValueError, match=r"bare.*head.weight \(3, 16\) / \(2, 16\)") as raised:
        ak.load(bare, config=vit().config)
    assert "position (1, 5, 16) / none" in str(raised.value)


def test_files_of_tensors_alone_take_a_configuration(tmp_path):
    model = vit()
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    found = ak.load(tmp_path / "bare.safetensors", config=model.config)
    assert_same_bits(outputs(found).logits, outputs(model).logits)
    assert read(tmp_path / "bare.safetensors")[0] is None
    with pytest.raises(ValueError, match=r"bare.safetensors: expected a model's configuration"):
        ak.load(tmp_path / "bare.safetensors")


def test_another_configuration_than_the_files_is_refused(file):
    with refused("config"):
        ak.load(file, config=replace(vit().config, halt_threshold=1.0))
    ak.load(file, config=vit().config)


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "text.safetensors").write_text("no model")
    with pytest.raises(ValueError, match=r"text.safetensors: expected a whole safetensors file"):
        ak.load(tmp_path / "text.safetensors")
    for source in (tmp_path, tmp_path / "nothing"):
        with refused("source"):
            ak.load(source)
    with refused("device"):
        ak.load(ak.save(vit(), tmp_path), device="nowhere")
    with refused("dtype"):
        ak.load(tmp_path, dtype=torch.int8)


def test_what_cannot_be_saved(tmp_path):
    class Mine(ak.models.AdaTapeViT):
        pass

    with pytest.raises(TypeError, match=r"model: expected .* got Mine"):
        ak.save(Mine(vit().config), tmp_path)
    with pytest.raises(TypeError, match=r"model: expected .* got Linear"):
        ak.save(torch.nn.Linear(2, 2), tmp_path)
    with refused("class_names"):
        ak.save(vit(), tmp_path, class_names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_where_writing_fails(file, monkeypatch):
    content = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        ak.save(vit(), file)
    assert file.read_bytes() == content and list(file.parent.iterdir()) == [file]
