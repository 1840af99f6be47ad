"""The public JAX code's results (tests/golden, SPEC 10), and what `verify` and `scenic` refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refused

from adatape_kernels import scenic, use_backend
from adatape_kernels.cli import main
from adatape_kernels.ops.op import BACKENDS, explain, why_absent
from adatape_kernels.recipes.verify import verify_file

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
READS = [file for file in FILES if file.name.startswith("tape_read")]
SERVING = [b for b in BACKENDS if explain("tape_select", "cpu", torch.float32)[b] == "serves"]


def altered(tmp_path, name, change):
    """A copy of a golden file whose arrays `change` has altered."""
    arrays = scenic.read_npz(Path(__file__).parent / "golden" / f"{name}.npz")
    change(arrays)
    path = tmp_path / "altered.npz"
    np.savez(path, **arrays)
    return path


def set_config(**entries):
    def change(arrays):
        config = json.loads(str(arrays["config"]))
        config.update(entries)
        arrays["config"] = np.array(json.dumps(config))

    return change


def test_all_golden_files_are_here():
    assert len(FILES) == 10


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file, backend):
    # CUDA C++ has no attention in float32, nor add_layer_norm.
    others = ("triton", "eager") if backend == "cuda" else ()
    with use_backend(backend, [other for other in others if why_absent(other) is None]):
        report = verify_file(file)
    serves = {op: explain(op, "cpu", torch.float32)[backend] == "serves" for op, _ in report.ran}
    assert any(serves.values()) and (others or all(serves.values()))
    assert all(served == backend for op, served in report.ran if serves[op])
    assert report.counts_agree
    assert not [c for c in report.comparisons if not c.passed]
    # Every output and gradient of the file was looked at.
    stored = [k for k in scenic.read_npz(file) if k.startswith("grad_")]
    assert {c.name for c in report.comparisons} >= set(stored)


def test_verify_prints_a_line_for_each_tensor_and_exits_with_0(capsys):
    assert main(["verify", str(READS[0]), str(FILES[0]), "--backend", "eager"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok, counts agree") == 2
    assert "grad_query" in out and "grad_params/cls" in out


@pytest.mark.parametrize(
    ("name", "entry", "factor"),
    [
        ("vit_input_token", "logits", 1.0001),
        ("vit_input_token", "grad_params/pre_bank/kernel", 1.001),
        (
            "vit_learn_token_two_reads",
            "params/Transformer/AddTapeToken_1/TapeBank_0/tape_tokens",
            2,
        ),
        ("tape_read_input_entropy", "tokens", 1.0001),
        ("tape_read_input_entropy", "grad_query", 1.001),
    ],
)
def test_verify_exits_with_1_when_a_tensor_differs(tmp_path, capsys, name, entry, factor):
    def change(arrays):
        arrays[entry] = arrays[entry] * np.float32(factor)

    assert main(["verify", str(altered(tmp_path, name, change))]) == 1
    assert "OVER TOLERANCE" in capsys.readouterr().out


def test_verify_exits_with_1_when_a_count_differs(tmp_path, capsys):
    def change(arrays):
        arrays["n_read"] = arrays["n_read"] + 1

    assert main(["verify", str(altered(tmp_path, "tape_read_learn_top1", change))]) == 1
    assert "counts DIFFER" in capsys.readouterr().out


def test_nan_is_over_tolerance(tmp_path):
    def change(arrays):
        arrays["query"][0] = np.nan

    report = verify_file(altered(tmp_path, "tape_read_learn_top1", change))
    assert not report.passed


def write_cut(path):
    path.write_bytes(FILES[0].read_bytes()[:5000])


def write_flipped(path):
    data = bytearray(READS[0].read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)


def write_pickled(path):
    np.savez(path, config=np.array({"kind": "tape_read"}, dtype=object))


def write_text(path):
    path.write_text("not an archive")


@pytest.mark.parametrize("write", [write_cut, write_flipped, write_pickled, write_text, None])
def test_verify_exits_with_2_for_an_unreadable_file(tmp_path, capsys, write):
    path = tmp_path / "broken.npz"
    if write is not None:
        write(path)
    assert main(["verify", str(READS[0]), str(path)]) == 2
    captured = capsys.readouterr()
    assert "ok, counts agree" in captured.out
    assert captured.err.startswith(f"{path}: expected a readable .npz file, got: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop("config"), "'config'"),
        (lambda arrays: arrays.update(config=np.array("[1")), "'config'"),
        (lambda arrays: arrays.pop("cotangent_logits"), "'cotangent_logits'"),
        (lambda arrays: arrays.pop("params/cls"), "'cls'"),
        (lambda arrays: arrays.update({"params/spare": np.zeros(1)}), "'spare'"),
        (lambda arrays: arrays.update({"params/cls": np.zeros((1, 1, 5))}), "class_token"),
        (set_config(kind="bert"), "'bert'"),
        (set_config(kind=None), "None"),
        (set_config(classifier="map"), "'map'"),
        (set_config(bank_norm=False), "bank_norm"),
        (set_config(add_tape_token_to_layers=[-1]), "-1"),
        (set_config(num_heads=5), "num_heads"),
        (set_config(hidden_size="48"), "dim: expected an integer"),
        (set_config(dynamic_tape_length=3), "entries"),
    ],
)
def test_verify_exits_with_2_for_a_file_of_another_form(tmp_path, capsys, change, words):
    path = altered(tmp_path, "vit_input_token", change)
    assert main(["verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: ") and error.count("\n") == 1
    assert words in error


def test_load_refuses_in_one_line():
    arrays = scenic.read_npz(FILES[0])
    config = scenic.read_config(arrays, FILES[0])
    params = {k: v for k, v in arrays.items() if k.startswith("params/")}
    with refused("config", "'num_classes'"):
        scenic.load(params, {k: v for k, v in config.items() if k != "num_classes"})
    halting = {**config["dynamic_tape_length"], "num_token_per_step": 2}
    with refused("config", "num_token_per_step"):
        scenic.load(params, {**config, "dynamic_tape_length": halting})
    with refused("params", "'cls'"):
        scenic.load({k: v for k, v in params.items() if k != "params/cls"}, config)


def test_load_file_builds_the_model():
    model = scenic.load_file(FILES[0])
    assert model.config.num_tape_tokens == 6
    assert model.config.topk == 3
