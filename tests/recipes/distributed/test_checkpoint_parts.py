"""Checkpoints whose tensors are divided among the files of several ranks."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.run_folder import claim

WEIGHT, BIAS = torch.arange(10.0).view(5, 2), torch.arange(1.0)
NAMES = [f"checkpoint-1-{number:08x}.safetensors" for number in range(3)]


def entry(name, content):
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def save(folder, parts):
    """Write a checkpoint of tensors that are divided as torch divides them."""
    entries = []
    for name, part in zip(NAMES, parts, strict=True):
        content = safetensors.torch.save(part)
        (folder / name).write_bytes(content)
        entries.append(entry(name, content))
    whole = Checkpoint(1, 3, {}, {}, [{}], {}, {"rng": torch.zeros(2)})
    checkpoint.save(folder, whole, entries)


def parts_of(**tensors):
    """The rows of each of three ranks, of which the last ones may have none."""
    found = [{} for _ in NAMES]
    for name, tensor in tensors.items():
        chunks = tensor.chunk(len(NAMES))
        for number, part in enumerate(found):
            part[name] = (chunks[number] if number < len(chunks) else tensor[:0]).contiguous()
    return found


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, parts_of(weight=WEIGHT, bias=BIAS))
    return tmp_path


def test_parts_are_joined(folder):
    loaded = checkpoint.load(folder)
    assert loaded.format == 3 and loaded.tensors.keys() == {"rng", "weight", "bias"}
    assert torch.equal(loaded.tensors["weight"], WEIGHT)
    assert torch.equal(loaded.tensors["bias"], BIAS)


def test_the_next_checkpoint_removes_the_parts_of_the_last(folder):
    with claim(folder) as run:
        checkpoint.save(run, Checkpoint(1, 3, {}, {}, [{}], {}, {"rng": torch.zeros(2)}))
    assert checkpoint.load(folder).format == 2
    assert sum(file.suffix == ".safetensors" for file in folder.iterdir()) == 1


def test_what_killed_ranks_have_left_is_removed(folder):
    """Nothing of the present checkpoint is."""
    with claim(folder) as run:
        left = [
            "checkpoint-2-0000abcd.safetensors",
            "checkpoint-2-0000abcd.safetensors.1-00000000.part",
        ]
        run.note(*left, *NAMES)
        for name in left:
            (folder / name).touch()
        checkpoint.remove_leftovers(run)
    assert not any((folder / name).exists() for name in left)
    assert checkpoint.load(folder).epoch == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_is_cut_or_missing_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: expected {len(content)} bytes, got"):
        checkpoint.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected the tensors of checkpoint.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "parts",
    [
        [{"weight": WEIGHT}, {"weight": WEIGHT}, {}],
        [{"weight": WEIGHT}, {"weight": WEIGHT[:, :1].contiguous()}, {"weight": WEIGHT}],
        [{"weight": WEIGHT}, {"weight": WEIGHT.double()}, {"weight": WEIGHT}],
        3 * [{"weight": torch.zeros(())}],
    ],
)
def test_parts_of_different_tensors_are_refused(tmp_path, parts):
    save(tmp_path, parts)
    with pytest.raises(ValueError, match=r"checkpoint.json: expected weight in like parts"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        None,
        [],
        {},
        ["checkpoint-1.safetensors"],
        [{"file": NAMES[0], "bytes": 1}],
        [{"file": NAMES[0], "bytes": "1", "sha256": ""}],
        [{"file": 1, "bytes": 1, "sha256": ""}],
    ],
)
def test_an_index_with_other_parts_is_refused(folder, parts):
    file = folder / checkpoint.INDEX
    index = json.loads(file.read_bytes())
    file.write_bytes(checkpoint.sealed({**index, "parts": parts}))
    with pytest.raises(ValueError, match=r"checkpoint.json: expected parts of file, bytes, sha256"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../checkpoint-1.safetensors", "/etc/passwd", ""])
def test_a_part_outside_of_the_folder_is_refused(folder, name):
    file = folder / checkpoint.INDEX
    index = json.loads(file.read_bytes())
    index["parts"][1]["file"] = name
    file.write_bytes(checkpoint.sealed(index))
    with pytest.raises(ValueError, match=r"expected file of the form checkpoint-N.safetensors"):
        checkpoint.load(folder)
