"""Packed self-attention in the field's signatures, beside torch's own product a sequence."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from attention_cases import not_served, qkv
from checks import assert_close, assert_low_precision, assert_same_bits
from torch.nn.attention import varlen

from adatape_kernels.ops import varlen_attention, varlen_attn
from adatape_kernels.ops.implementation import FLOAT_DTYPES

OP = "elastic_attention"
pytestmark = pytest.mark.absent_if(reason=not_served)
LENS = (3, 0, 5, 1)


def bounds(lens=LENS, dtype=torch.int32, device="cpu"):
    return F.pad(torch.tensor(lens, device=device).cumsum(0), (1, 0)).to(dtype)


def each_alone(q, k, v, lens=LENS, scale=None):
    """What torch's attention gives for each sequence alone, and zero in the rows behind them."""
    parts = zip(*(x.split([*lens, len(x) - sum(lens)]) for x in (q, k, v)), strict=True)
    outs = []
    for part in list(parts)[:-1]:
        heads_first = (x.transpose(0, 1) for x in part)
        out = F.scaled_dot_product_attention(
            *heads_first, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        outs.append(out.transpose(0, 1))
    return torch.cat([*outs, torch.zeros_like(q[sum(lens) :])])


def with_gradients(run, q, k, v, dout):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_attention_within_each_sequence(device, offsets, scale):
    q, k, v, dout = qkv(11, 2, 8, device=device)
    cu = bounds(dtype=offsets, device=device)
    wide = [x.double() for x in (q, k, v, dout)]
    expected = with_gradients(lambda *x: each_alone(*x, scale=scale), *wide)
    ours = with_gradients(lambda *x: varlen_attention(*x, cu, softmax_scale=scale), q, k, v, dout)
    torchs = with_gradients(
        lambda *x: varlen_attn(*x, cu, cu.int(), 5, 5, scale=scale), q, k, v, dout
    )
    for a, b, e in zip(ours, torchs, expected, strict=True):
        assert_close(a, e, 1e-5)
        assert_same_bits(a[:9], b[:9])


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 56, 72, 80, 96, 120, 128, 168, 200, 256])
def test_heads_of_any_multiple_of_eight(device, head_dim):
    q, k, v, dout = qkv(9, 1, head_dim, device=device)
    cu = bounds(device=device)
    expected = with_gradients(each_alone, *(x.double() for x in (q, k, v, dout)))
    actual = with_gradients(lambda *x: varlen_attention(*x, cu), q, k, v, dout)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_low_precision(device, dtype):
    lens = (17, 0, 40, 3)
    q, k, v, dout = qkv(sum(lens), 2, 64, device=device, dtype=dtype)
    cu = bounds(lens, device=device)

    def alone(*x):
        return each_alone(*x, lens)

    actual = with_gradients(lambda *x: varlen_attn(*x, cu, None, 40, 40), q, k, v, dout)
    plain = with_gradients(alone, q, k, v, dout)
    exact = with_gradients(alone, *(x.double() for x in (q, k, v, dout)))
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_low_precision(a, p, e, floor=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_groups_of_heads_share_keys(device, heads):
    q, _, _, dout = qkv(9, 4, 8, device=device)
    _, k, v, _ = qkv(9, heads, 8, device=device)
    cu = bounds(device=device)
    expected = with_gradients(each_alone, *(x.double() for x in (q, k, v, dout)))
    actual = with_gradients(
        lambda *x: varlen_attn(*x, cu, cu, 5, 5, enable_gqa=True), q, k, v, dout
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


def test_log_sum_exp(device):
    q, k, v, _ = qkv(9, 2, 8, device=device)
    cu = bounds(device=device)
    out, lse = varlen_attn(
        q.requires_grad_(), k, v, cu, cu, 5, 5, return_aux=varlen.AuxRequest(lse=True)
    )
    assert out.requires_grad and not lse.requires_grad
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / 8**0.5
    sequence = torch.repeat_interleave(torch.tensor(LENS, device=device))
    scores = scores.where(sequence[:, None] == sequence, -torch.inf)
    assert_close(lse.double(), scores.logsumexp(-1), 1e-5)
    alone = varlen_attn(q, k, v, cu, cu, 5, 5, return_aux=varlen.AuxRequest())
    assert_same_bits(alone, out)


@pytest.mark.no_backend
def test_parameters_are_those_of_torch():
    ours, torchs = (inspect.signature(f).parameters for f in (varlen_attn, varlen.varlen_attn))
    assert list(ours) == list(torchs)
    for name, parameter in torchs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


@pytest.mark.no_backend
def test_one_graph_of_any_lengths():
    compiled = torch.compile(
        lambda q, k, v, cu: varlen_attn(q, k, v, cu, cu, 5, 5), fullgraph=True, dynamic=True
    )
    for lens in ((3, 2), (1, 0, 5), (4,)):
        q, k, v, dout = qkv(sum(lens), 2, 8, device="cpu")
        cu = bounds(lens)
        actual = with_gradients(lambda *x, cu=cu: compiled(*x, cu), q, k, v, dout)
        expected = with_gradients(lambda *x, lens=lens: each_alone(*x, lens), q, k, v, dout)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-5)


def arguments(**changed):
    q = torch.zeros(9, 4, 8)
    cu = bounds()
    return dict(query=q, key=q, value=q, cu_seq_q=cu, cu_seq_k=cu, max_q=5, max_k=5) | changed


@pytest.mark.no_backend
@pytest.mark.parametrize(
    ("changed", "error", "parts"),
    [
        (dict(window_size=(-1, 0)), NotImplementedError, ["window_size", "(-1, 0)"]),
        (dict(window_size=[2, 2]), NotImplementedError, ["window_size", "(2, 2)"]),
        (dict(seqused_k=bounds()), NotImplementedError, ["seqused_k"]),
        (dict(block_table=bounds()), NotImplementedError, ["block_table"]),
        (dict(max_k=4), NotImplementedError, ["max_k", "5", "4"]),
        (dict(cu_seq_k=bounds((3, 1, 4, 1))), NotImplementedError, ["cu_seq_k"]),
        (dict(cu_seq_k=bounds((3, 6))), NotImplementedError, ["cu_seq_k"]),
        (dict(key=torch.zeros(9, 2, 8)), ValueError, ["key", "4 heads", "enable_gqa", "2"]),
        (dict(value=torch.zeros(9, 3, 8), enable_gqa=True), ValueError, ["value", "divides 4"]),
        (dict(key=torch.zeros(9, 0, 8), enable_gqa=True), ValueError, ["key", "divides 4"]),
        (dict(query=torch.zeros(9, 8)), ValueError, ["query:", "(9, 8)"]),
        (dict(key=torch.zeros(8, 4, 8)), ValueError, ["key:", "like query"]),
        (dict(cu_seq_q=bounds((3, -1, 5)), cu_seq_k=None), ValueError, ["cu_seq_q:", "ascending"]),
        (dict(cu_seq_q=bounds((10,)), cu_seq_k=None), ValueError, ["cu_seq_q:", "10"]),
        (dict(cu_seq_q=bounds().float(), cu_seq_k=None), ValueError, ["cu_seq_q:", "int32"]),
        (dict(max_q=4, max_k=4), ValueError, ["max_q:", "5", "4"]),
    ],
)
def test_refusals(changed, error, parts):
    with pytest.raises(error) as raised:
        varlen_attn(**arguments(**changed))
    (line,) = str(raised.value).splitlines()
    assert all(part in line for part in parts), line


@pytest.mark.no_backend
def test_refusals_name_the_bounds_as_they_are_called_here():
    q = torch.zeros(9, 4, 8)
    for cu, limit, name in ((bounds((10,)), None, "cu_seqlens:"), (bounds(), 4, "max_seqlen:")):
        with pytest.raises(ValueError, match=name):
            varlen_attention(q, q, q, cu, limit)
