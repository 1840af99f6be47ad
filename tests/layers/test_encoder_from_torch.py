"""`ElasticEncoder.from_torch`: our encoder in the place of torch's."""

import pytest
import torch
from checks import assert_close, refused
from torch import nn

from adatape_kernels import ElasticBatch
from adatape_kernels.layers import ElasticEncoder, TapeReader

DIM, HEADS, HIDDEN = 24, 3, 40


def torch_encoder(norm=True, depth=3, **options):
    defaults = {"dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **{**defaults, **options})
    last = nn.LayerNorm(DIM, 0.1) if norm else None
    encoder = nn.TransformerEncoder(layer, depth, last, enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("threshold", [None, 0.0], ids=["no reader", "reads nothing"])
def test_while_nothing_is_read_the_rows_are_torch_s(norm, norm_first, activation, threshold):
    theirs = torch_encoder(norm, norm_first=norm_first, activation=activation, layer_norm_eps=0.2)
    readers = None
    if threshold is not None:
        readers = {1: TapeReader(DIM, num_tape_tokens=4, topk=2, halt_threshold=threshold)}
    ours = ElasticEncoder.from_torch(theirs, 6, readers)
    lens = torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lens.unsqueeze(1)
    x, bank = torch.randn(3, 9, DIM), torch.randn(3, 20, DIM)
    y, reads = ours(ElasticBatch.from_padded(x, mask), bank)
    expected = theirs(x, src_key_padding_mask=~mask).detach()
    assert_close(y.to_padded()[0][mask], expected[mask], 1e-5)
    assert y.lens.tolist() == lens.tolist() and len(reads) == (threshold is not None)


def test_gradients_are_torch_s():
    theirs = torch_encoder()
    ours, x = ElasticEncoder.from_torch(theirs), torch.randn(2, 5, DIM)
    theirs(x).square().sum().backward()
    ours(ElasticBatch.from_padded(x))[0].data.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad, 1e-3)
        assert ours.get_parameter(name).data_ptr() != parameter.data_ptr()


def test_mode_dtype_rates_and_frozen_parameters_are_taken_over():
    theirs = torch_encoder(dropout=0.2).double().train()
    theirs.norm.requires_grad_(False)
    ours = ElasticEncoder.from_torch(theirs, 6, stochastic_depth=0.1, row_multiple=8)
    assert ours.training and ours.layers[0].training and ours.row_multiple == 8
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert {(layer.dropout, layer.stochastic_depth) for layer in ours.layers} == {(0.2, 0.1)}
    assert [n for n, p in ours.named_parameters() if not p.requires_grad] == [
        "norm.weight",
        "norm.bias",
    ]


def test_what_ours_does_not_have_is_named_all_at_once():
    theirs = torch_encoder(activation=nn.SiLU())
    theirs.norm = nn.RMSNorm(DIM)
    theirs.layers[1].self_attn.add_zero_attn = True
    with refused("encoder", "norm of class", "layers.*: the activation", "layers.1: self_attn"):
        ElasticEncoder.from_torch(theirs)
    hooked = torch_encoder()
    hooked.register_forward_hook(lambda *_: None)
    with refused("encoder", "it with hooks"):
        ElasticEncoder.from_torch(hooked)
    with refused("encoder", "no layers"):
        ElasticEncoder.from_torch(torch_encoder(depth=0))
    with refused("encoder", "the class torch.nn.modules.linear.Linear"):
        ElasticEncoder.from_torch(nn.Linear(3, 3))
