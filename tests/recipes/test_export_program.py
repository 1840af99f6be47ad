"""Models as programs of torch.export: any batch size, the model's results, and what is refused."""

import json

import pytest
import torch
from export_cases import model_of

import adatape_kernels as ak
from adatape_kernels import reference
from adatape_kernels.cli import main
from adatape_kernels.models.padded import batched_topk_select
from adatape_kernels.ops.compiled_part import FACTS
from adatape_kernels.recipes import exporting
from adatape_kernels.recipes.exporting import artefacts, export_model
from adatape_kernels.recipes.exporting.agreement import Disagreement
from adatape_kernels.recipes.exporting.traced_program import example_inputs

compiled = pytest.mark.skipif(FACTS["compiled"] == "no", reason="no compiled part")


def namespaces(program):
    """Whose ops a program calls, those of torch's own left out."""
    targets = (str(node.target).split(".") for node in program.graph.nodes)
    return {target[0] for target in targets if len(target) == 3} - {"aten"}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param("input_token", "cpp", marks=compiled),
        ("learn_gap_two_reads", None),
        ("learn_gap_two_reads", "eager"),
        ("parity", "eager"),
    ],
)
def test_a_program_gives_the_models_results(kind, backend, tmp_path):
    model = model_of(kind)
    found = export_model(model, tmp_path / "new" / "model.pt2", backend=backend)
    extra = {"adatape_kernels": ""}
    program = torch.export.load(found.file, extra_files=extra)
    expected = {None: {"adatape"}, "eager": set(), "cpp": {"adatape_cpu"}}[backend]
    assert namespaces(program) == expected and found.backend == (backend or "adatape")
    for size in (1, 5, 12):
        inputs = example_inputs(model, size, seed=40 + size)
        output = model(inputs)
        logits, tape_lens = program.module()(inputs)
        torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)
        assert tape_lens.equal(output.tape_lens)
    assert found.batch_sizes == (1, 2, 3, 7) and found.largest_difference < 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())

    facts = json.loads(extra["adatape_kernels"])
    assert facts["class_names"] == list(model.class_names)
    assert facts["input"] == {
        "name": "inputs",
        "dtype": "float32",
        "shape": list(inputs.shape[1:]),
        "most": None,
    }
    if kind == "parity":
        assert facts["preprocessing"] is None
    else:
        assert ak.data.Preprocessing.from_entries(facts["preprocessing"]) == model.preprocessing


@pytest.mark.parametrize("batch", [1, 2])
def test_a_bound_of_the_batch(batch, tmp_path):
    model = model_of("input_token")
    found = export_model(model, tmp_path / "model.pt2", batch=batch, capacity=3)
    assert found.batch_sizes == tuple(range(1, batch + 1))
    program = torch.export.load(found.file).module()
    program(example_inputs(model, batch))
    with pytest.raises(Exception, match=r"(?i)guard|expected"):
        program(example_inputs(model, batch + 1))


def test_bfloat16(tmp_path):
    model = model_of("input_token", torch.bfloat16)
    found = export_model(model, tmp_path / "model.pt2", batch=3)
    assert found.largest_difference <= 0.1
    logits, _ = torch.export.load(found.file).module()(example_inputs(model, 2))
    assert logits.dtype == torch.bfloat16


def test_equal_bank_tokens_are_selected_in_order():
    keys = torch.randint(-2, 3, (5, 30, 4)).float()
    keys[:, 10:20] = keys[:, :10]
    options = {"num_tape_tokens": 4, "topk": 3, "halt_threshold": 2.0}
    options |= {"average_query": True, "loss_type": "entropy"}
    query = torch.randint(-2, 3, (5, 4)).float()
    for bank in (keys, keys[0]):
        found = batched_topk_select(query, bank, in_order=True, **options)
        expected = reference.tape_select(query, bank, **options)
        assert found.indices.equal(expected.indices) and found.counts.equal(expected.counts)
        torch.testing.assert_close(found.weights, expected.weights)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model in it, as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    ak.save(model_of("input_token"), folder)
    return folder


def test_the_command_writes_into_the_run(saved, capsys):
    assert main(["export", str(saved), "--threshold", "9"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{saved / 'model.export.pt2'}: torch.export, the ops of this package")
    assert "1, 2, 3, 7" in second
    program = torch.export.load(saved / "model.export.pt2").module()
    _, tape_lens = program(example_inputs(model_of("input_token"), 3))
    assert tape_lens.tolist() == [3, 3, 3]


def test_the_command_in_json(saved, tmp_path, capsys):
    out = tmp_path / "plain.pt2"
    given = ["--json", "--backend", "eager", "--batch", "3", "--out", str(out)]
    assert main(["export", str(saved), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(out) and found["size"] == out.stat().st_size
    assert (found["backend"], found["batch"], found["batch_sizes"]) == ("eager", 3, [1, 2, 3])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--format", "tflite"], "format: expected torch.export, aoti, onnx, got 'tflite'"),
        (["--batch", "0"], "batch: expected 1 or more, got 0"),
        (["--batch", "-3"], "batch: expected 1 or more, got -3"),
        (["--capacity", "-1"], "capacity: expected 0 or more, got -1"),
        (["--capacity", "4"], "capacity: expected 0 to num_tape_tokens = 3, got 4"),
        (["--capacity", "2", "--backend", "eager"], "capacity: expected none for plain torch"),
        (["--backend", "triton"], "backend: expected eager or cpp"),
        (["--format", "onnx", "--backend", "cpp"], "backend: expected eager for onnx"),
        (["--format", "onnx", "--dtype", "bfloat16"], "model: expected torch.float32 on cpu"),
        (["--backend", "cpp", "--dtype", "float64"], "in float32, bfloat16, float16 on cpu"),
        (["--dtype", "int8"], "dtype: expected float32"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
        (["--threshold", "nan"], "halt_threshold"),
        (["--out", "model.onnx"], "out: expected a file *.pt2 for torch.export, got model.onnx"),
        (["--out", "model"], "out: expected a file *.pt2"),
        (["--out", "/proc/x/model.pt2"], "out: expected a folder that can be made and written"),
        (["--out", "/dev/null/model.pt2"], "out: expected a folder"),
        (["--capacity", "0"], "capacity"),  # random images read more
    ],
)
def test_what_the_command_refuses(saved, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(saved.iterdir())
    assert main(["export", str(saved), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert sorted(saved.iterdir()) == before and not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_file_and_no_run(saved, tmp_path, capsys):
    (tmp_path / "model.pt2").mkdir()
    for source, out, words in (
        (saved, tmp_path / "model.pt2", "out: expected a file, got the folder"),
        (tmp_path / "none", tmp_path / "a.pt2", "source: expected a file or a folder"),
        (tmp_path, tmp_path / "a.pt2", "source: expected a folder with model.safetensors"),
    ):
        assert main(["export", str(source), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path, monkeypatch, saved, capsys):
    loads = artefacts.load_artefact

    def off(file, format):
        served = loads(file, format)

        def call(inputs):
            logits, tape_lens = served(inputs)
            return logits + 1e-2 * (len(inputs) == 7), tape_lens

        return call

    monkeypatch.setattr(exporting, "load_artefact", off)
    with pytest.raises(Disagreement, match=r"a difference of 0\.01"):
        export_model(model_of("input_token"), tmp_path / "model.pt2")
    assert main(["export", str(saved), "--out", str(tmp_path / "model.pt2")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected the model's logits" in line and not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"onnx: expected the packages .*\[export\]"):
        export_model(model_of("parity"), tmp_path / "model.onnx", format="onnx")


def test_a_model_of_another_class(tmp_path):
    class Other(ak.models.AdaTape):
        def embed(self, inputs):
            return self.with_class_token(inputs), inputs

    config = ak.models.AdaTapeConfig(num_classes=2, dim=8, depth=1, num_heads=2, ffn_dim=8)
    with pytest.raises(TypeError, match="expected AdaTapeViT or AdaTapeParity, got Other"):
        export_model(Other(config), tmp_path / "model.pt2")
    with pytest.raises(TypeError, match="model: expected an object of AdaTape"):
        export_model(torch.nn.ReLU(), tmp_path / "model.pt2")
