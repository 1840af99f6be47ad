"""An encoder layer in plain torch, on dense tensors and a mask of what exists."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.activations import activate
from adatape_kernels.layers import ElasticEncoderLayer
from adatape_kernels.layers.torch_modules import make_weights


def encode_padded(
    layer: ElasticEncoderLayer, y: Tensor, mask: Tensor | None, num_inputs: int
) -> Tensor:
    """Apply one encoder layer to every position.

    Args:
        layer: the layer.
        y: (batch, positions, dim), and so is what is returned.
        mask: (batch, positions) bool, which of them others see; None for all.
        num_inputs: number of input positions, which come before those of the tape.
    """
    make_weights(layer)
    make_weights(layer.self_attn)
    if layer.norm_first:
        y = add_branch(layer, y, attend_padded(layer, layer.norm1(y), mask), layer.dropout1)
        fed_forward = feed_forward_padded(layer, layer.norm2(y), num_inputs)
        return add_branch(layer, y, fed_forward, layer.dropout2)
    y = layer.norm1(add_branch(layer, y, attend_padded(layer, y, mask), layer.dropout1))
    fed_forward = feed_forward_padded(layer, y, num_inputs)
    return layer.norm2(add_branch(layer, y, fed_forward, layer.dropout2))


def attend_padded(layer: ElasticEncoderLayer, data: Tensor, mask: Tensor | None) -> Tensor:
    """Let every position attend to those that exist.

    Args:
        layer: whose attention it is.
        data: (batch, positions, dim), and so is what is returned.
        mask: (batch, positions), bool, or of data's dtype, what is added to the scores of a key;
            None where all exist.
    """
    attention = layer.self_attn
    qkv = F.linear(data, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[:, None, None, :],
        dropout_p=attention.dropout if layer.training else 0.0,
    )
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def feed_forward_padded(layer: ElasticEncoderLayer, data: Tensor, num_inputs: int) -> Tensor:
    """Apply the feed-forward of input rows, and that of tape rows behind num_inputs positions."""
    inputs = data[:, :num_inputs] if layer.has_tape_ffn else data
    act = activate(layer.linear1(inputs), layer.activation)
    y = layer.linear2(F.dropout(act, layer.dropout, layer.training))
    if not layer.has_tape_ffn:
        return y
    act = F.glu(layer.tape_linear1(data[:, num_inputs:]))
    tape = layer.tape_linear2(F.dropout(act, layer.dropout, layer.training))
    return torch.cat([y, tape], 1)


def add_branch(layer: ElasticEncoderLayer, x: Tensor, branch: Tensor, rate: float) -> Tensor:
    """Add a branch (batch, positions, dim), in training after dropout and stochastic depth."""
    out = F.dropout(branch, rate, layer.training)
    if layer.training and layer.stochastic_depth > 0:
        keep = out.new_empty(out.shape[0], 1, 1).bernoulli_(1 - layer.stochastic_depth)
        out = out * keep
        if layer.rescale_kept:
            out = out / (1 - layer.stochastic_depth)
    return x + out
