"""The activations of the two feed-forwards and their slopes, in plain torch (SPEC 6).

They have their limits at every number, the infinite ones included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.op_types import Activation, wide_dtype

# GELU of a number above this is the number itself, and that of its negative is 0, even in float64.
_GELU_END = 40.0
_FORM = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """Return the activation of an input row's pre-activations, of any shape.

    GELU has its limits at ±infinity, where torch's product of infinity and 0 is NaN.
    """
    if activation == "relu":
        return F.relu(hidden)
    bounded = hidden.clamp(-_GELU_END, _GELU_END)
    return hidden.where(hidden > _GELU_END, F.gelu(bounded, approximate=_FORM[activation]))


def activate_bwd(dact: Tensor, hidden: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of the pre-activations."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dact, hidden, 0)
    bounded = hidden.clamp(-_GELU_END, _GELU_END)
    return torch.ops.aten.gelu_backward(dact, bounded, approximate=_FORM[activation])


def glu(hidden: Tensor) -> Tensor:
    """Return a · sigmoid(g) of a tape row's pre-activations [a, g].

    Its ops have tangents of tangents, which torch's own GLU has not.
    """
    a, g = hidden.to(wide_dtype(hidden.dtype)).chunk(2, -1)
    return (a * _sigmoid(g)).to(hidden.dtype)


def glu_bwd(dact: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient of a tape row's pre-activations."""
    wide = wide_dtype(hidden.dtype)
    a, g = hidden.to(wide).chunk(2, -1)
    dact, gate = dact.to(wide), _sigmoid(g)
    return torch.cat([dact * gate, dact * (a * gate * _sigmoid(-g))], -1).to(hidden.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), also where exp(-x) overflows and torch.sigmoid returns 0."""
    return F.logsigmoid(x).exp()
