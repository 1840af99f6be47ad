"""`from_torch`: our layers in the place of torch's, and what they do not take over."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, refused
from torch import nn
from torch.nn.utils import parametrize

from adatape_kernels import ElasticBatch
from adatape_kernels.layers import DualFFN, ElasticAttention, ElasticEncoder, ElasticEncoderLayer
from adatape_kernels.models.padded_layer import encode_padded

DIM, HEADS, HIDDEN = 24, 3, 40
ACTIVATIONS = {
    "F.relu": F.relu,
    "relu": "relu",
    "torch.relu": torch.relu,
    "ReLU": nn.ReLU(),
    "F.gelu": F.gelu,
    "gelu": "gelu",
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU(approximate="tanh"),
    "partial": functools.partial(F.gelu, approximate="tanh"),
}


def torch_layer(activation="relu", **options):
    defaults = dict(dropout=0.0, batch_first=True)
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, activation=activation, **{**defaults, **options}
    ).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def assert_same(ours, theirs, x, tolerance=1e-5):
    """Outputs, and gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    expected = theirs(x, x, x)[0] if isinstance(theirs, nn.MultiheadAttention) else theirs(x)
    dy = torch.randn_like(expected)
    pairs = [(ours.get_parameter(name), p) for name, p in theirs.named_parameters()]
    ours_of, theirs_of = zip(*pairs, strict=True)
    expected_grads = torch.autograd.grad(expected, [x, *theirs_of], dy)
    y, _ = ours(ElasticBatch.from_padded(x)).to_padded()
    grads = torch.autograd.grad(y, [x, *ours_of], dy)
    for a, e in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert_close(a, e.detach(), tolerance)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_equals_torch_s(activation, norm_first):
    theirs = torch_layer(ACTIVATIONS[activation], norm_first=norm_first, layer_norm_eps=0.01)
    ours = ElasticEncoderLayer.from_torch(theirs)
    assert not ours.training
    # Small inputs, for which the epsilon decides.
    assert_same(ours, theirs, 0.1 * torch.randn(3, 9, DIM))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_a_layer_without_biases_equals_torch_s(norm_first):
    theirs = torch_layer(bias=False, norm_first=norm_first)
    ours = ElasticEncoderLayer.from_torch(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same(ours, theirs, torch.randn(3, 9, DIM))


def test_each_epsilon_is_taken_over():
    theirs = torch_layer(norm_first=True)
    theirs.norm1.eps, theirs.norm2.eps = 0.5, 0.01
    assert_same(ElasticEncoderLayer.from_torch(theirs), theirs, 0.1 * torch.randn(3, 9, DIM))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_training_and_frozen_parameters_are_taken_over(dtype):
    theirs = torch_layer().to(dtype).train()
    theirs.linear1.requires_grad_(False)
    ours = ElasticEncoderLayer.from_torch(theirs, tape_ffn_dim=6)
    assert ours.training and ours.self_attn.training
    assert {p.dtype for p in ours.parameters()} == {dtype}
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {"linear1.weight", "linear1.bias"}
    x = ElasticBatch.from_padded(torch.randn(2, 5, DIM, dtype=dtype))
    assert ours(x).data.dtype == dtype


def test_the_parameters_are_copies():
    theirs = torch_layer()
    ours = ElasticEncoderLayer.from_torch(theirs)
    addresses = [{p.data_ptr() for p in layer.parameters()} for layer in (ours, theirs)]
    assert not addresses[0] & addresses[1]


def test_the_device_is_taken_over():
    ours = ElasticEncoderLayer.from_torch(torch_layer().to("meta"), tape_ffn_dim=6)
    assert {p.device.type for p in ours.parameters()} == {"meta"}


def test_each_dropout_rate_is_taken_over():
    theirs = torch_layer(dropout=0.1)
    theirs.dropout.p, theirs.dropout1.p, theirs.dropout2 = 0.2, 0.3, nn.Identity()
    theirs.self_attn.dropout = 0.4
    ours = ElasticEncoderLayer.from_torch(theirs, stochastic_depth=0.5)
    rates = ours.dropout, ours.dropout1, ours.dropout2, ours.self_attn.dropout
    assert rates == (0.2, 0.3, 0.0, 0.4) and ours.stochastic_depth == 0.5


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2", "attention"])
def test_a_rate_of_nearly_one_drops_its_own_branch(name):
    """Where torch drops nearly everything, ours does."""
    theirs = torch_layer(norm_first=True)
    if name == "attention":
        theirs.self_attn.dropout = 1 - 1e-6
    else:
        getattr(theirs, name).p = 1.0
    x = torch.randn(2, 5, DIM)
    ours = ElasticEncoderLayer.from_torch(theirs.train())
    y, _ = ours(ElasticBatch.from_padded(x)).to_padded()
    assert_close(y, theirs(x).detach(), 1e-5)


@pytest.mark.parametrize("lens", [(9, 4, 1), (9, 0, 9)])
def test_a_post_norm_layer_leaves_padding_and_unused_rows_out(lens):
    theirs = torch_layer()
    ours = ElasticEncoderLayer.from_torch(theirs)
    mask = torch.arange(9) < torch.tensor(lens).unsqueeze(1)
    x = torch.randn(3, 9, DIM)
    batch = ElasticBatch.from_padded(x, mask)
    y, _ = ours(batch).to_padded()
    present = [i for i, n in enumerate(lens) if n]
    expected = theirs(x[present], src_key_padding_mask=~mask[present]).detach()
    assert_close(y[present][mask[present]], expected[mask[present]], 1e-5)
    offsets = torch.zeros(4, dtype=torch.int32)
    roomy = batch.append_tape(torch.zeros(5, DIM), offsets, max_tapes=0, exact=False)
    unused = ours(roomy).data
    assert_close(unused[: sum(lens)], ours(batch).data.detach(), 1e-6)
    assert not unused[sum(lens) :].any()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_the_padded_layer_follows(activation, norm_first):
    ours = ElasticEncoderLayer.from_torch(torch_layer(activation, norm_first=norm_first))
    x = torch.randn(2, 5, DIM)
    y = encode_padded(ours, x, torch.ones(2, 5, dtype=torch.bool), 5)
    assert_close(ours(ElasticBatch.from_padded(x)).to_padded()[0], y.detach(), 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("kdim", dict(kdim=5), ["kdim = 5"]),
        ("vdim", dict(vdim=7), ["vdim = 7"]),
        ("bias_kv", dict(add_bias_kv=True), ["add_bias_kv = True"]),
        ("zero", dict(add_zero_attn=True, kdim=5), ["add_zero_attn = True", "kdim = 5"]),
    ],
)
def test_an_attention_that_ours_is_not_is_refused(name, options, parts):
    with refused("attention", *parts):
        ElasticAttention.from_torch(nn.MultiheadAttention(DIM, HEADS, **options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_equals_torch_s(bias, batch_first):
    theirs = nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=True, dropout=0.2).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = ElasticAttention.from_torch(theirs)
    assert (ours.dropout, ours.training) == (0.2, False)
    assert_same(ours, theirs, torch.randn(3, 9, DIM))
    theirs.batch_first = batch_first
    assert ElasticAttention.from_torch(theirs).num_heads == HEADS


def silu(layer):
    layer.activation = F.silu


def hooked(layer):
    layer.linear1.register_forward_hook(lambda *_: None)


def parametrised(layer):
    parametrize.register_parametrization(layer.linear2, "weight", nn.Identity())


def rms(layer):
    layer.norm2 = nn.RMSNorm(DIM)


def always_dropping(layer):
    layer.dropout1.p = 0.5
    layer.dropout1.train()


def other_attention(layer):
    layer.self_attn = nn.MultiheadAttention(DIM, HEADS, kdim=5, add_zero_attn=True)


def replaced_forward(layer):
    layer.forward = lambda x: x


CHANGES = {
    silu: "the activation 'silu'",
    hooked: "linear1 with hooks",
    parametrised: "linear2 of class torch.nn.utils.parametrize.ParametrizedLinear",
    rms: "norm2 of class torch.nn.modules.normalization.RMSNorm",
    always_dropping: "dropout1.training = True",
    other_attention: "self_attn: kdim = 5; self_attn: add_zero_attn = True",
    replaced_forward: "it with hooks, a forward of its own",
}


@pytest.mark.parametrize(
    "changes",
    [*((c,) for c in CHANGES), *itertools.islice(itertools.combinations(CHANGES, 3), 3)],
    ids=lambda changes: " and ".join(c.__name__ for c in changes),
)
def test_what_ours_does_not_have_is_named_all_at_once(changes):
    layer = torch_layer()
    for change in changes:
        change(layer)
    with refused("layer", *(CHANGES[change] for change in changes)):
        ElasticEncoderLayer.from_torch(layer)


def test_a_subclass_and_a_stranger_are_refused():
    class Odd(nn.TransformerEncoderLayer):
        def forward(self, x):
            return 2 * super().forward(x)

    with refused("layer", "Odd"):
        ElasticEncoderLayer.from_torch(Odd(DIM, HEADS, HIDDEN))
    with refused("layer", "torch.nn.modules.linear.Linear"):
        ElasticEncoderLayer.from_torch(nn.Linear(3, 3))


def test_activations_that_act_like_ours_under_another_name_are_refused_by_it():
    for activation, text in ((lambda x: F.relu(x), "<lambda>"), (nn.SiLU(), "SiLU()")):
        with refused("layer", text):
            ElasticEncoderLayer.from_torch(torch_layer(activation))


def test_an_unknown_activation_is_refused():
    with refused("activation", "gelu_tanh, gelu, relu", "'silu'"):
        DualFFN(DIM, HIDDEN, activation="silu")


def test_an_encoder_of_converted_layers_equals_torch_s():
    theirs = nn.TransformerEncoder(torch_layer(), 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
    ours = ElasticEncoder(
        [ElasticEncoderLayer.from_torch(layer) for layer in theirs.layers], DIM, norm_eps=1e-5
    )
    ours.norm.load_state_dict(theirs.norm.state_dict())
    x = torch.randn(3, 9, DIM)
    y, _ = ours(ElasticBatch.from_padded(x))
    assert_close(y.to_padded()[0], theirs(x).detach(), 1e-5)
