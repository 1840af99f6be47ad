"""The activations of `dual_ffn` in Triton, which both forms of its products use."""

from adatape_kernels.ops.triton_runtime import tl, triton

CHUNK = 128
"""Rows whose sum, or whose part of a weight's gradient, one program may keep to itself."""


@triton.jit
def gelu(h):
    """Return h / 2 · (1 + tanh(u)) as h · sigmoid(2u), without an exponential that overflows."""
    return h * tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * h * h))


@triton.jit
def gelu_bwd(h, dact):
    """Return the gradient of h, and the activation once more."""
    square = h * h
    s = tl.sigmoid(1.5957691216057308 * h * (1 + 0.044715 * square))
    slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * square)
    return dact * slope, h * s


@triton.jit
def glu_bwd(a, g, dact):
    """Return the gradients of a and g, and the activation once more."""
    s = tl.sigmoid(g)
    return dact * s, dact * a * s * (1 - s), a * s
