"""What a type checker tells a user of the package, and what keeps the typed options complete."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest

import adatape_kernels as ak

PACKAGE = Path(ak.__file__).parent

# Each line with an error ends in a comment that holds what mypy must say about it.
PROGRAM = """\
import torch

import adatape_kernels as ak

config = ak.models.AdaTapeViTConfig(
    num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, halt_threshold=1.5
)
model = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=config.num_classes)
wrong = ak.models.adatape_vit("S/16", dim="384")  # has incompatible type "str"; expected "int"
output = model(torch.zeros(2, 3, 8, 8), capacity=20)
loss: torch.Tensor = model.loss(output, torch.tensor([0, 4]))
same: ak.models.AdaTapeOutput = model.padded()(torch.zeros(2, 3, 8, 8))
tokens = [read.counts.sum() for read in output.reads]
print(output.logit.shape)  # "AdaTapeOutput" has no attribute "logit"; maybe "logits"?

layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16)
batch = ak.ElasticBatch.from_padded(torch.zeros(2, 3, 8))
encoded: torch.Tensor = layer(batch).pool("mean")
plain: torch.Tensor = layer(torch.zeros(2, 3, 8))
layer([1.0])  # Value of type variable "Rows" of function cannot be "list[float]"
reader = ak.layers.TapeReader(8, num_tape_tokens=4, topk=2, halt_threshold=2.0, bank_size=30)
longer, selection = reader(batch)
print(longer.lens, selection.ponder)
"""


def test_mypy_finds_the_errors_of_a_user_and_no_others(tmp_path):
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    # On the interpreter's path mypy takes the package as an installed one: it asks for py.typed.
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "MYPYPATH": "", "MYPY_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    expected = {
        number: line.split("  # ")[1]
        for number, line in enumerate(PROGRAM.splitlines(), start=1)
        if "  # " in line
    }
    errors = re.findall(r"^program\.py:(\d+): error: (.*)$", found.stdout, re.MULTILINE)
    assert [int(number) for number, _ in errors] == list(expected), found.stdout + found.stderr
    for number, message in errors:
        assert expected[int(number)] in message
    assert len(found.stdout.splitlines()) == len(errors) == 3, found.stdout


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (ak.models.AdaTapeOptions, ak.models.AdaTapeConfig),
        (ak.models.AdaTapeViTOptions, ak.models.AdaTapeViTConfig),
        (ak.models.EncoderOptions, ak.models.EncoderConfig),
        (ak.models.ViTOptions, ak.models.ViTConfig),
        (ak.models.TransformerOptions, ak.models.TransformerConfig),
        (ak.models.UniversalOptions, ak.models.UniversalConfig),
        (ak.models.UViTOptions, ak.models.UViTConfig),
        (ak.models.UniversalTransformerOptions, ak.models.UniversalTransformerConfig),
        (ak.models.AViTOptions, ak.models.AViTConfig),
    ],
)
def test_the_typed_options_are_the_fields_of_the_configuration(options, config):
    assert get_type_hints(options) == get_type_hints(config)


def test_the_marker_for_type_checkers_is_packaged():
    assert (PACKAGE / "py.typed").is_file()
