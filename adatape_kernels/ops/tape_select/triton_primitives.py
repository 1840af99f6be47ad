"""What the Triton kernels of `tape_select` share: the order of scores."""

from adatape_kernels.ops.triton_runtime import tl, triton


@triton.jit
def ordered(scores, readable):
    """Integers in the order of the scores: NaN below every number, the unreadable below NaN."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(scores == scores, order, -0x7FFFFFFF)
    return tl.where(readable, order, -0x80000000)


@triton.jit
def ranked(order, entries):
    """int64 whose maximum is the best order, and among equals the lowest entry."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - entries)


@triton.jit
def entry_of(ranked):
    """The entry that `ranked` has put into its integer."""
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def score_of(ranked):
    """The score whose order `ranked` has put into its integer."""
    order = (ranked >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
