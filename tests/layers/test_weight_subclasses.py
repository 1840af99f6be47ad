"""Weights that are subclasses of Tensor and answer torch's functions themselves."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from drop_in_cases import LINEAR, batch, layer
from torch import nn

from adatape_kernels.layers import ElasticEncoderLayer


class Doubled(torch.Tensor):
    """A weight that counts twice in F.linear, as a quantised one brings its scale there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
            return y + F.linear(args[0], args[1]) if function is F.linear else y


@pytest.mark.parametrize("path", LINEAR)
def test_a_weight_that_answers_itself_is_asked(path):
    torch.manual_seed(0)
    theirs = layer()
    torch.manual_seed(0)
    ours, x = layer(), batch()
    linear = theirs.get_submodule(path)
    linear.weight.requires_grad_(False)
    linear._parameters["weight"] = linear.weight.as_subclass(Doubled)
    with torch.no_grad():
        ours.get_submodule(path).weight.mul_(2)
        assert_close(theirs(x).data, ours(x).data, 1e-4)


def test_an_unknown_form_of_gelu_is_named():
    activation = nn.GELU()
    activation.approximate = "rough"
    theirs = nn.TransformerEncoderLayer(8, 2, 16, activation=activation)
    with pytest.raises(ValueError, match="the activation GELU"):
        ElasticEncoderLayer.from_torch(theirs)
