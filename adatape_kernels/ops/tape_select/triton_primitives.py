"""What the forward and the backward of `tape_select` in Triton share."""

from adatape_kernels.ops.triton_runtime import tl, triton


@triton.jit
def softmax(scores, mask):
    """Softmax over the last axis; NaN everywhere if a score is NaN, or the best one infinite."""
    scores = tl.where(mask, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, -1, keep_dims=True))
    exponentials = tl.where(mask, exponentials, 0.0)
    # Rounded division: equal scores weigh exactly 1 / topk, so that halting at τ is exact.
    return tl.div_rn(exponentials, tl.sum(exponentials, -1, keep_dims=True))
