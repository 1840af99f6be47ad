"""The public JAX code's UViTs and ViT (tests/golden/halting), and what is refused of such files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refused

from adatape_kernels import models, scenic, use_backend
from adatape_kernels.ops.op import BACKENDS, explain, why_absent
from adatape_kernels.recipes.verify import verify_file

FILES = sorted((Path(__file__).parents[1] / "golden" / "halting").glob("*.npz"))
SERVING = [b for b in BACKENDS if explain("accumulate_rows", "cpu", torch.float32)[b] == "serves"]
# Those for which interpreted kernels take up to five seconds: examples leave after each step of the
# one, and of the other, which is for Triton alone, rows halt.
INTERPRETED = {"triton": ("uvit_unshared_early", "uvit_tokens_basic")}
INTERPRETED["cuda"] = INTERPRETED["triton"][:1]


def altered(tmp_path, name, change):
    arrays = scenic.read_npz(FILES[0].with_name(f"{name}.npz"))
    config = json.loads(str(arrays["config"]))
    change(arrays, config)
    arrays["config"] = np.array(json.dumps(config))
    path = tmp_path / "altered_halting.npz"
    np.savez(path, **arrays)
    return path


def test_all_files_are_here():
    assert len(FILES) == 6


@pytest.mark.parametrize(
    ("file", "backend"),
    [
        pytest.param(file, backend, id=f"{file.stem}-{backend}")
        for file in FILES
        for backend in SERVING
        if backend in ("eager", "cpp") or file.stem in INTERPRETED[backend]
    ],
)
def test_golden(file, backend):
    others = ("triton", "eager") if backend == "cuda" else ()
    with use_backend(backend, [other for other in others if why_absent(other) is None]):
        report = verify_file(file)
    assert backend in {served for _, served in report.ran}
    assert report.counts_agree
    assert not [c for c in report.comparisons if not c.passed]
    arrays = scenic.read_npz(file)
    looked_at = {c.name for c in report.comparisons}
    assert looked_at >= {k for k in arrays if k.startswith("grad_")}
    expected = {"logits", "ponder_times", "remainders", "ponder_loss"}
    expected = (expected | {"halting_scores", "halting_probability"}) & arrays.keys()
    assert looked_at >= expected


ENTRIES = ["logits", "remainders", "ponder_loss", "grad_inputs"]
ENTRIES += ["halting_scores", "halting_probability"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_altered_tensor_is_over_tolerance(tmp_path, entry):
    def change(arrays, config):
        arrays[entry] = arrays[entry] * np.float32(1.001)

    assert not verify_file(altered(tmp_path, "uvit_unshared_early", change)).passed


def test_other_steps_differ(tmp_path):
    def change(arrays, config):
        arrays["n_steps"] = arrays["n_steps"] + np.int32(1)

    assert not verify_file(altered(tmp_path, "uvit_unshared_early", change)).counts_agree


ACT = {"act_max_steps": 6, "act_epsilon": 0.01, "act_type": "basic", "act_level": "per_example"}
ACT |= {"act_halting_bias_init": -1.0, "act_loss_weight": 0.01}


@pytest.mark.parametrize(
    ("entries", "argument"),
    [
        ({"classifier": "map"}, "config"),
        ({"parameter_sharing": 1}, "parameter_sharing"),
        ({"ac_config": 3}, "config"),
        (
            {"ac_config": {**ACT, "act_type": "random"}},
            "act_type",
        ),
        ({"ac_config": {**ACT, "act_level": "token"}}, "act_level"),
        ({"ac_config": {**ACT, "act_epsilon": 1.5}}, "act_epsilon"),
        ({"ac_config": {**ACT, "act_max_steps": 0}}, "depth"),
        ({"ac_config": {}}, "config"),
        ({"ac_config": {**ACT, "act_max_steps": 5}}, "params"),
        ({"num_heads": 5}, "num_heads"),
        ({"patch": 7}, "patch_size"),
        ({"positional_embedding": "sinusoidal_2d"}, "config"),
        ({"representation_size": 48}, "config"),
        ({"kind": "swin"}, "config"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, entries, argument):
    path = altered(tmp_path, "uvit_unshared_early", lambda arrays, config: config.update(entries))
    with refused(f"{path}: {argument}"):
        verify_file(path)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda arrays: arrays.pop("n_steps"), "expected an entry"),
        (lambda arrays: arrays.update(n_steps=arrays["n_steps"][:2]), "n_steps"),
        (lambda arrays: arrays.update(remainders=arrays["remainders"].astype("f8")), "remainders"),
        (lambda arrays: arrays.pop("params/UTransformer/encoder_norm/scale"), "params"),
        (lambda arrays: arrays.update({"params/more": np.zeros(3, "f4")}), "params"),
    ],
)
def test_a_wrong_array_is_one_line(tmp_path, change, argument):
    path = altered(tmp_path, "uvit_unshared_early", lambda arrays, config: change(arrays))
    with pytest.raises(ValueError, match=argument) as info:
        verify_file(path)
    assert "\n" not in str(info.value)


def test_two_halting_units_are_no_model():
    arrays = scenic.read_npz(FILES[1])
    params = {name: array for name, array in arrays.items() if name.startswith("params/")}
    unit = next(name for name in params if name.endswith("step_halting_prob/bias"))
    params[unit.replace("/act/", "/act/other/")] = params[unit]
    with refused("params"):
        scenic.load(params, json.loads(str(arrays["config"])))


def test_a_loaded_model_says_what_it_is():
    model = scenic.load_file(FILES[0].with_name("uvit_unshared_token.npz"))
    assert isinstance(model, models.UViT) and model.config.num_layers == 6
    name = "UTransformer/encoderblock/LayerNorm_0/scale"
    target = scenic.parameter_map(model)[name]
    assert target.of(model.state_dict()).shape == (6, 48)
    shared = scenic.load_file(FILES[0].with_name("uvit_shared_no_act.npz"))
    assert shared.encoder.halting is None and shared.config.num_layers == 1
    assert isinstance(scenic.load_file(FILES[0]), models.ViT)
