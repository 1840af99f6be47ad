"""torch's own modules, set up as AdaTape's public code sets them up."""

from torch import nn

NORM_EPS = 1e-6
"""Epsilon of every LayerNorm, as in the public JAX code; torch's own default is 1e-5."""


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear module whose weight is Xavier uniform and whose bias is zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
