"""`elastic_attention` by the reference, on every device and in every dtype."""

from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.offsets import check_examples
from adatape_kernels.ops.implementation import implementation


@implementation(checks_values=True)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Look at the offsets, on any device, then run the reference."""
    check_examples(cu_inputs, cu_tapes, len(q), max_rows)
    return reference.elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale)


@implementation(checks_values=True)
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Look at the offsets, on any device, then run the reference."""
    check_examples(cu_inputs, cu_tapes, len(q), max_rows)
    return reference.elastic_attention_bwd(
        dout, q, k, v, out, lse, cu_inputs, cu_tapes, softmax_scale
    )
