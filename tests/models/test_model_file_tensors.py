"""A model's file whose tensors are none that a model has is one line that names the file."""

import json
import struct

import pytest
import safetensors.torch
import torch
from checks import refused

import adatape_kernels as ak
from adatape_kernels.models import model_file

pytestmark = pytest.mark.runs_no_op


@pytest.fixture
def file(tmp_path):
    options = dict(image_size=8, depth=1, dim=8, num_heads=2, ffn_dim=8, num_classes=2)
    return ak.save(ak.models.adatape_vit("Ti/4", **options), tmp_path / "model.safetensors")


def with_tensors(file, change):
    """The file with other tensors and the checksum that belongs to them."""
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = change(safetensors.torch.load_file(file))
    metadata.pop(model_file._CHECKSUM)
    checksum = model_file._checksum(metadata, tensors)
    file.write_bytes(safetensors.torch.save(tensors, {**metadata, model_file._CHECKSUM: checksum}))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
def test_dtypes_that_no_parameter_has(file, dtype):
    with_tensors(file, lambda tensors: {**tensors, "head.bias": torch.zeros(2).to(dtype)})
    with refused(str(file), "head.bias", str(dtype)):
        ak.load(file)


def test_norms_may_be_wider_than_the_rest(file):
    def narrowed(tensors):
        return {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}

    with_tensors(file, narrowed)
    assert {p.dtype for p in ak.load(file).parameters()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    "shape", [[0, 2**64 - 1], [0, 2**63], [0, 2**62, 2**62], [2**40, 2**40, 0]]
)
def test_sizes_that_no_tensor_has(file, shape):
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps({"head.bias": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with refused(str(file)):
        ak.load(file)
