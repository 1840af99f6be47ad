"""ViTs whose examples all have the same length, for the elastic model to be measured beside.

They run on an AdaTape model's own parameters, without a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.benchmarks.ops.reading_peers import loop, padded_gather
from adatape_kernels.layers import ElasticEncoderLayer, TapeReader
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.ops import FFN


class DenseViT(nn.Module):
    """A ViT with a fixed number of tape rows an example: it reads them, or they are zeros.

    Without reading it shows what the elastic model would cost if its elasticity cost nothing.
    """

    def __init__(self, model: AdaTapeViT, tape_rows: int, reads: bool):
        super().__init__()
        self.model, self.tape_rows, self.reads = model, tape_rows, reads

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        if self.reads:
            x, bank = model.embed(images)
        else:
            tokens = model.patch_embed(images).flatten(2).mT
            x, bank = model.with_class_token(tokens) + model.position, None
        num_inputs = x.shape[1]
        for layer, reader in model.encoder.stages():
            if reader is not None:
                tape = (
                    self._read(reader, x, bank)
                    if self.reads
                    else x.new_zeros(len(x), self.tape_rows, x.shape[2])
                )
                x = torch.cat([x, tape], 1)
            x = x + _attend(layer, layer.norm1(x))
            x = x + _feed_forward(layer, layer.norm2(x), num_inputs)
        return model.head(model.encoder.norm(x)[:, 0])

    def _read(self, reader: TapeReader, x: Tensor, bank: Tensor | None) -> Tensor:
        values, query, _ = reader.normalised(bank, x[:, 0])
        selection = loop(
            query[:, : reader.key_dim],
            values[..., : reader.key_dim],
            num_tape_tokens=self.tape_rows,
            topk=reader.topk,
            halt_threshold=float("inf"),
        )
        return padded_gather(values, selection.indices, selection.weights)


def _attend(layer: ElasticEncoderLayer, x: Tensor) -> Tensor:
    attention = layer.self_attn
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(layer: ElasticEncoderLayer, x: Tensor, num_inputs: int) -> Tensor:
    one, two = layer.input_ffn, layer.tape_ffn
    if two is None:
        return _gelu(x, one)
    tape = F.glu(F.linear(x[:, num_inputs:], two.w1, two.b1))
    return torch.cat([_gelu(x[:, :num_inputs], one), F.linear(tape, two.w2, two.b2)], 1)


def _gelu(x: Tensor, ffn: FFN) -> Tensor:
    act = F.gelu(F.linear(x, ffn.w1, ffn.b1), approximate="tanh")
    return F.linear(act, ffn.w2, ffn.b2)
