"""A layer with all its parts, and batches, for tests of what may stand in a part's place."""

import torch
from torch import nn

from adatape_kernels import ElasticBatch
from adatape_kernels.layers import ElasticEncoderLayer

DIM, HEADS, HIDDEN, TAPE_HIDDEN = 24, 3, 40, 16
LINEAR = ["linear1", "linear2", "tape_linear1", "tape_linear2", "self_attn.out_proj"]
NORMS = ["norm1", "norm2"]


def layer(**options):
    made = ElasticEncoderLayer(DIM, HEADS, HIDDEN, TAPE_HIDDEN, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def batch(**like):
    x = torch.randn(3, 6, DIM, **like)
    mask = torch.arange(6) < torch.tensor([6, 3, 5]).unsqueeze(1)
    return ElasticBatch.from_padded(x, mask, tape_lens=torch.tensor([2, 0, 3]))


def gradients(module, x):
    data = x.data.detach().requires_grad_()
    y = module(x.with_data(data)).data
    (dx,) = torch.autograd.grad(y, data, torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), dx
