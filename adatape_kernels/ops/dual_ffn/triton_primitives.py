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
        u = 1.5957691216057308 * inner * (1 + 0.044715 * inner * inner)
        gate, _ = _gates(u, tl.exp(-tl.abs(u)))
        return above * gate


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
        u = 1.5957691216057308 * inner * (1 + 0.044715 * square)
        gate, closed = _gates(u, tl.exp(-tl.abs(u)))
        slope = gate + inner * gate * closed * 1.5957691216057308 * (1 + 0.134145 * square)
        return dact * slope, above * gate


@triton.jit
def sigmoid(x):
    """Return the logistic function of x, its least values too as precise as float32 is."""
    gate, _ = _gates(x, _exp_of_negative(-tl.abs(x)))
    return gate


@triton.jit
def _gates(x, e):
    """Return the logistic function of x and that of -x, each as precise as e = exp(-|x|) is."""
    large = 1 / (1 + e)
    return tl.where(x < 0, e * large, large), tl.where(x < 0, large, e * large)


@triton.jit
def _exp_of_negative(x):
    """Return exp(x) for x <= 0, right to a few units in the last place of float32.

    On a GPU `tl.exp` takes 2 to the power of x · log2(e), which it rounds, so that its relative
    error grows with |x|. Here exp(x) is exp(x - m ln 4) 4ᵐ, with the integer m nearest to x / ln 4.
    """
    x = tl.where(x < -104, -104.0, x)  # whose exponential is 0 in float32; NaN stays NaN
    shifted = x * 0.7213475204444817 + 12582912.0  # 1.5 · 2²³, so that m stands in the last bits
    m = shifted - 12582912.0
    rest = x - m * 1.38671875 + m * 4.2438888010942755e-4  # ln 4 in two parts, the first one short
    # 2ᵐ by its bits, twice, because 4ᵐ may be too small to have an exponent of its own.
    root = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp(rest) * root * root


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
    gate, closed = _gates(g, _exp_of_negative(-tl.abs(g)))
    act = a * gate
    return dact * gate, dact * (act * closed), act
