"""Models as ONNX files: onnxruntime gives the model's results at every batch size."""

import json

import pytest
import torch
from export_cases import MODELS, model_of

from adatape_kernels.recipes.exporting import export_model
from adatape_kernels.recipes.exporting.traced_program import example_inputs

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.parametrize("kind", MODELS)
def test_onnxruntime_gives_the_models_results(kind, tmp_path):
    model = model_of(kind)
    found = export_model(model, tmp_path / "model.onnx", format="onnx")
    assert found.backend == "eager" and found.largest_difference < 1e-5
    session = onnxruntime.InferenceSession(found.file, providers=["CPUExecutionProvider"])
    for size in (1, 4, 11):
        inputs = example_inputs(model, size, seed=40 + size)
        logits, tape_lens = session.run(["logits", "tape_lens"], {"inputs": inputs.numpy()})
        output = model(inputs)
        torch.testing.assert_close(torch.from_numpy(logits), output.logits, rtol=1e-5, atol=1e-4)
        assert tape_lens.tolist() == output.tape_lens.tolist()
    facts = json.loads(session.get_modelmeta().custom_metadata_map["adatape_kernels"])
    assert facts["class_names"] == list(model.class_names)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
