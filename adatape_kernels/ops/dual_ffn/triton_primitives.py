"""The activations of `dual_ffn` in Triton, which both forms of its products use."""

from adatape_kernels.ops.triton_runtime import tl, triton

CHUNK = 128
"""Rows whose sum, or whose part of a weight's gradient, one program may keep to itself."""


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """Return the activation that has this name in `op_types.ACTIVATIONS`."""
    if ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, h)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        size, _, tail = _normal_tail(h)
        return tl.where(h > 0, h, 0.0) - size * tail
    else:
        # h / 2 · (1 + tanh(u)) is h · sigmoid(2u), without an exponential that overflows.
        above, inner = _limited(h)
        return above * sigmoid(1.5957691216057308 * inner * (1 + 0.044715 * inner * inner))


@triton.jit
def activate_bwd(h, dact, ACTIVATION: tl.constexpr):
    """Return the gradient of h, and the activation once more."""
    if ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, dact), tl.where(h <= 0, 0.0, h)
    elif ACTIVATION == "gelu":
        size, bell, tail = _normal_tail(h)
        signed_size = tl.where(h > 0, size, -size)
        slope = tl.where(h > 0, 1 - tail, tail) + signed_size * bell * 0.3989422804014327
        return dact * slope, tl.where(h > 0, h, 0.0) - size * tail
    else:
        above, inner = _limited(h)
        square = inner * inner
        gate, closed = _gates(1.5957691216057308 * inner * (1 + 0.044715 * square))
        slope = gate + inner * gate * closed * 1.5957691216057308 * (1 + 0.134145 * square)
        return dact * slope, above * gate


@triton.jit
def sigmoid(x):
    """Return the logistic function of x, also where exp(-x) overflows."""
    gate, _ = _gates(x)
    return gate


@triton.jit
def _gates(x):
    """Return the logistic function of x and that of -x, each to its full precision."""
    e = tl.exp(-tl.abs(x))
    large = 1 / (1 + e)
    return tl.where(x < 0, e * large, large), tl.where(x < 0, large, e * large)


@triton.jit
def _limited(h):
    """Return h from -20 on, and from -20 to 20; NaN stays NaN.

    Outside, the gate of GELU's tanh form is 0 or 1 in float32, and infinity would be multiplied
    by 0.
    """
    above = tl.where(h < -20, -20.0, h)
    return above, tl.where(above > 20, 20.0, above)


@triton.jit
def _normal_tail(h):
    """Return |h|, exp(-h² / 2) and Q(|h|) for the exact GELU; csrc/activation.h has the formula.

    |h| ends at 20, where the others are 0, so that infinity is not multiplied by 0; NaN stays NaN.
    """
    size = tl.where(tl.abs(h) > 20, 20.0, tl.abs(h))
    bell = tl.exp(-0.5 * size * size)
    s = 1 / (1 + 0.26 * size)
    p = 0.25431764 + s * (-0.1541892 + s * 0.030783568)
    p = 0.16322021 + s * (-0.15420616 + s * p)
    p = 0.10328538 + s * (0.050047074 + s * p)
    p = 0.10376126 + s * (0.10298022 + s * p)
    return size, bell, bell * (s * p)


@triton.jit
def glu_bwd(a, g, dact):
    """Return the gradients of a and g, and the activation once more."""
    gate, closed = _gates(g)
    act = a * gate
    return dact * gate, dact * (act * closed), act
