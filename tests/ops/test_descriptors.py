"""The tensor descriptors that `dual_ffn` makes are those that Triton's constructor would make."""

import dataclasses
import importlib

import pytest
import torch

pytest.importorskip("triton")
UP = importlib.import_module("adatape_kernels.ops.dual_ffn.triton_up")


@pytest.mark.parametrize(
    ("shape", "block"), [([32, 48], [16, 64]), ([2, 16, 48], [2, 8, 64])], ids=str
)
def test_a_descriptor_is_as_tritons_own(shape, block):
    x = torch.empty(32, 48, dtype=torch.float16)
    given = UP._descriptor(x, shape, block)
    expected = UP.TensorDescriptor.from_tensor(x.view(shape), block)
    assert type(given) is UP.TensorDescriptor and given.base is x
    for field in dataclasses.fields(UP.TensorDescriptor):
        if field.name != "base":
            ours, theirs = getattr(given, field.name), getattr(expected, field.name)
            lists = not isinstance(theirs, str | bool)  # a shape of torch is a tuple
            assert (list(ours) == list(theirs)) if lists else ours == theirs, field.name


def test_an_empty_tensor_has_none():
    assert UP._descriptor(torch.empty(0, 48), [0, 48], [16, 64]) is None
