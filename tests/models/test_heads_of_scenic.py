"""Heads that scenic has and the golden files lack: the first token of the input, and a dense layer.

The files' parameters are changed to those of such a model, and the logits are those of SPEC 11.
"""

import json
from pathlib import Path

import literal_classifiers as literal
import numpy as np
import pytest
import torch
from checks import refused

import adatape_kernels as ak
from adatape_kernels import models, scenic

HALTING = Path(__file__).parents[1] / "golden" / "halting"
SMALL = {"dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 24, "num_classes": 3}


def entries(name, **changes):
    arrays = scenic.read_npz(HALTING / f"{name}.npz")
    config = {**json.loads(str(arrays["config"])), **changes}
    params = {key: value for key, value in arrays.items() if key.startswith("params/")}
    return params, config, torch.tensor(arrays["inputs"]).permute(0, 3, 1, 2).double()


def without_class_token(params):
    del params["params/cls"]
    name = next(key for key in params if key.endswith("pos_embedding"))
    params[name] = params[name][:, 1:]


def plain(model, image):
    """The normed rows of an image, by the definition."""
    rows = model.embed(image.unsqueeze(0))[0][0]
    for layer in model.encoder.layers:
        rows = literal.block(layer, rows, torch.ones(len(rows), dtype=torch.bool))
    return model.encoder.norm(rows)


def test_a_plain_vit_whose_head_sees_the_first_patch():
    params, config, images = entries("plain_vit_token", classifier="0")
    without_class_token(params)
    model = scenic.load(params, config).double()
    assert model.class_token is None and model.num_prefix_tokens == 0
    assert "class_token=False" in str(model)
    kernel, bias = (params[f"params/output_projection/{leaf}"] for leaf in ("kernel", "bias"))
    with torch.no_grad():
        expected = torch.stack([plain(model, image)[0] for image in images])
        expected = expected @ torch.tensor(kernel).double() + torch.tensor(bias).double()
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-10, atol=1e-10)
        padded = model.padded()(images).logits
        torch.testing.assert_close(padded, expected, rtol=1e-10, atol=1e-10)


def test_a_uvit_whose_head_sees_the_first_patch():
    params, config, images = entries("uvit_unshared_token", classifier="0")
    without_class_token(params)
    model = scenic.load(params, config).double()
    with torch.no_grad():
        found = literal.universal(model, images)
        logits, steps, _ = (torch.stack(parts) for parts in zip(*found, strict=True))
        output = model(images)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    assert torch.equal(output.halted.steps, steps[:, 0])


@pytest.mark.parametrize("width", [5, 48])
def test_a_dense_layer_and_tanh_before_the_head(width):
    generator = np.random.default_rng(0)
    params, config, images = entries("plain_vit_token", representation_size=width)
    classes = config["num_classes"]
    added = {"pre_logits/kernel": (48, width), "pre_logits/bias": (width,)}
    added |= {"output_projection/kernel": (width, classes), "output_projection/bias": (classes,)}
    for name, shape in added.items():
        params[f"params/{name}"] = generator.normal(size=shape).astype(np.float32)
    model = scenic.load(params, config).double()
    assert model.head_hidden_size == width
    dense, out = (
        [torch.tensor(params[f"params/{name}/{leaf}"]).double() for leaf in ("kernel", "bias")]
        for name in ("pre_logits", "output_projection")
    )
    with torch.no_grad():
        rows = torch.stack([plain(model, image)[0] for image in images])
        between = torch.tanh(rows @ dense[0] + dense[1])
        features = model.forward_features(images)
        found = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(found, between, rtol=1e-10, atol=1e-10)
        expected = between @ out[0] + out[1]
        for logits in (model(images).logits, model.padded()(images).logits):
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert "pre_logits" in str(model)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "avit_tiny_patch16_224", "adatape_tiny_patch16_224"]
)
def test_a_dense_layer_stays_when_the_classes_change(name, tmp_path):
    own = {"topk": 2} if name.startswith("adatape") else {}
    model = models.create_model(name, **SMALL, **own, image_size=32, representation_size=7)
    given, dense = torch.randn(2, 3, 32, 32), model.head.pre_logits
    between = model.forward_head(model.forward_features(given), pre_logits=True)
    assert between.shape == (2, 7)
    for classes in (0, 0, 5, 4):
        model.reset_classifier(classes)
        logits = model(given).logits
        assert logits.shape == (2, classes or 7) and model.head.pre_logits is dense
        if classes == 0:
            assert torch.equal(logits, between)
    loaded = ak.load(ak.save(model.eval(), tmp_path))
    assert loaded.config.representation_size == 7
    assert torch.equal(loaded(given).logits, model(given).logits)
    assert torch.allclose(model.padded()(given).logits, loaded(given).logits, atol=1e-5)


def test_what_contradicts_is_one_line():
    with refused("num_registers", "0", "2"):
        models.ViTConfig(**SMALL, class_token=False, num_registers=2)
    with refused("representation_size", "0", "7"):
        models.ViTConfig(**SMALL, norm_after_pooling=True, representation_size=7)
    assert not models.ViTConfig(**SMALL, pooling="mean").has_class_token
    for name, classifier in (("plain_vit_token", "map"), ("uvit_unshared_token", "none")):
        with refused("config", "token, gap, gmp, gsp, 0", classifier):
            scenic.model_config(entries(name, classifier=classifier)[1])
    with refused("config", "representation_size null", "48"):
        scenic.model_config(entries("uvit_unshared_token", representation_size=48)[1])
    act = entries("uvit_unshared_token")[1]["ac_config"]
    with refused("act_type", "as JAX alone draws", "'random'"):
        random = {**act, "act_type": "random"}
        scenic.model_config(entries("uvit_unshared_token", ac_config=random)[1])
    for wrong in (0, -1, 1.5, "48", True):
        with refused("representation_size", str(wrong)):
            scenic.model_config(entries("plain_vit_token", representation_size=wrong)[1])


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"class_token": False}, {}], ids=str)
def test_the_means_of_an_avit_leave_out_a_class_token_alone(options):
    gate = {"gate_scale": 2.0, "gate_center": 1.0, "image_size": 32, "patch_size": 8}
    model = models.AViT(models.AViTConfig(**SMALL, **gate, **options)).double()
    given = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = model.embed(given)[0]
    rows = ak.ElasticBatch.from_padded(tokens)
    p = model.encoder.gate(
        model.encoder.halting.start(rows), model.encoder.layers[0](rows).data
    ).view(3, -1)
    expected = p[:, model.num_prefix_tokens :].mean()
    torch.testing.assert_close(model(given).halted.means[0], expected, rtol=1e-12, atol=0)
    if options:
        with refused("keep_class_token", "False", "True"):
            models.AViTConfig(**SMALL, **options, keep_class_token=True)
