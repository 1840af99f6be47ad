"""`elastic_attention` by the reference, on every device and in every dtype."""

import torch
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


@implementation(checks_values=True)
def packed_forward(
    qkv: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend with the three parts of qkv."""
    return forward.function(*qkv.unbind(1), cu_inputs, cu_tapes, max_rows, softmax_scale)


@implementation(checks_values=True)
def packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> Tensor:
    """Put the gradients of the three parts of qkv together."""
    parts = backward.function(
        dout, *qkv.unbind(1), out, lse, cu_inputs, cu_tapes, max_rows, softmax_scale
    )
    return torch.stack(parts, 1)
