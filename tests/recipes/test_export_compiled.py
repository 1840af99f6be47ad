"""A model that AOTInductor compiled, run from C++: `make serve` builds the program and runs this.

Compiling takes minutes, so that these tests are skipped where ADATAPE_SERVE does not name the
program.
"""

import json
import os
import subprocess

import pytest
import torch
from export_cases import model_of

from adatape_kernels.recipes.exporting import export_model
from adatape_kernels.recipes.exporting.traced_program import example_inputs

PROGRAM = os.environ.get("ADATAPE_SERVE")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="`make serve` builds its program")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return model_of("input_token")


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("compiled") / "model.pt2"
    return export_model(model, file, format="aoti")


def serve(file, inputs):
    return subprocess.run([PROGRAM, file, inputs], capture_output=True, text=True)


def test_it_calls_our_kernels_and_tells_what_it_is(model, found):
    assert found.backend == "cpp" and found.largest_difference < 1e-4
    metadata = torch._inductor.aoti_load_package(found.file).get_metadata()
    names = [schema.partition("(")[0] for schema in metadata["adatape_kernels.ops"].splitlines()]
    assert {"dual_ffn", "elastic_attention_qkvpacked", "tape_gather", "tape_select"} <= set(names)
    facts = json.loads(metadata["adatape_kernels"])
    assert facts["class_names"] == list(model.class_names)


@pytest.mark.parametrize("batch", [1, 6])
def test_a_program_in_cpp_gives_the_models_results(model, found, batch, tmp_path):
    inputs = example_inputs(model, batch, seed=40 + batch)
    inputs.numpy().tofile(tmp_path / "inputs")
    process = serve(found.file, tmp_path / "inputs")
    assert process.returncode == 0, process.stderr
    rows = [[float(number) for number in line.split()] for line in process.stdout.splitlines()]
    output = model(inputs)
    torch.testing.assert_close(
        torch.tensor([row[:-1] for row in rows]), output.logits.detach(), rtol=1e-4, atol=1e-4
    )
    assert [row[-1] for row in rows] == output.tape_lens.tolist()


def test_what_a_program_in_cpp_refuses(found, tmp_path):
    (tmp_path / "inputs").write_bytes(b"abc")
    for file, words in ((tmp_path / "inputs", "got 3"), (tmp_path / "none", "cannot read")):
        process = serve(found.file, file)
        assert process.returncode == 1 and words in process.stderr
