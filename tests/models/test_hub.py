"""huggingface_hub's mixin on a local folder; nothing is downloaded."""

import json
import subprocess
import sys

import pytest
import torch
from checks import assert_same_bits

import adatape_kernels as ak

OP = None
pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def model():
    torch.manual_seed(0)
    return ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=2).eval()


def test_a_folder_comes_back(tmp_path):
    ours = model()
    ours.class_names = ("cat", "dog")
    ours.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 8
    found = ak.models.AdaTapeViT.from_pretrained(tmp_path, dtype=torch.float64)
    assert found.class_names == ("cat", "dog") and not found.training
    images = torch.rand(2, 3, 8, 8)
    assert_same_bits(found.float()(images).logits, ours(images).logits)
    assert_same_bits(ak.load(tmp_path)(images).logits, ours(images).logits)


def test_the_file_decides_over_config_json(tmp_path):
    model().save_pretrained(tmp_path)
    other = json.loads((tmp_path / "config.json").read_text()) | {"halt_threshold": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert ak.models.AdaTapeViT.from_pretrained(tmp_path).config == model().config


def test_a_model_of_another_class_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a model of AdaTapeParity, got AdaTapeViT"):
        ak.models.AdaTapeParity.from_pretrained(tmp_path)


def test_models_do_without_the_package():
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; import adatape_kernels as ak;"
        "model = ak.models.adatape_vit('Ti/4', image_size=8, depth=1);"
        "assert not hasattr(model, 'from_pretrained')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
