"""What `elastic_attention` computes; test_elastic_attention_cuda.py has heads of 64 in CUDA C++."""

import math

import literal
import pytest
import torch
import torch.nn.functional as F
from attention_cases import by_reference, gradients, layout, not_served, qkv
from checks import assert_close, assert_low_precision, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from adatape_kernels.ops import elastic_attention
from adatape_kernels.ops.op import current_backend

OP = "elastic_attention"
pytestmark = pytest.mark.absent_if(reason=not_served)


def assert_matches_literal(q, k, v, cu_inputs, cu_tapes, softmax_scale=None, **options):
    out = elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale, **options)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    expected = literal.elastic_attention(
        *(x.tolist() for x in (q, k, v, cu_inputs, cu_tapes)), scale
    )
    assert out.dtype == q.dtype and out.is_contiguous()
    assert_close(out, torch.tensor(expected, dtype=torch.float64).view(q.shape), 1e-5)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("softmax_scale", [None, 0.3, 0.0, -1.0])
@pytest.mark.parametrize("unused", [0, 3])
def test_matches_the_literal_loop(device, unused, softmax_scale):
    cu_inputs, cu_tapes, _ = layout(device)
    q, k, v, _ = qkv(14 + unused, 3, 8, device=device)
    assert_matches_literal(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale)
    assert_matches_literal(q, k, v, cu_inputs, cu_tapes, softmax_scale, max_rows=6)


@st.composite
def ragged(draw):
    batch, lens = draw(st.integers(0, 4)), st.integers(0, 4)
    input_lens, tape_lens = (draw(st.lists(lens, min_size=batch, max_size=batch)) for _ in range(2))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return input_lens, tape_lens, draw(st.integers(0, 2)), shape


@given(case=ragged())
def test_any_lengths_match_the_literal_loop(device, case):
    input_lens, tape_lens, unused, shape = case
    cu_inputs, cu_tapes, _ = layout(device, input_lens, tape_lens)
    q, k, v, dout = qkv(sum(input_lens) + sum(tape_lens) + unused, *shape, device=device)
    assert_matches_literal(q, k, v, cu_inputs, cu_tapes)
    if sum(input_lens) + sum(tape_lens) == 0:
        return  # autograd of the reference has nothing to follow; test_empty has the gradients
    wide = (x.double() for x in (q, k, v, dout))
    expected = gradients(by_reference, *wide, cu_inputs, cu_tapes)
    actual = gradients(elastic_attention, q, k, v, dout, cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype):
    cu_inputs, cu_tapes, _ = layout(device)
    q, k, v, _ = qkv(15, 2, 3, device=device, dtype=dtype)

    def attention(q, k, v):
        return elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=0.4)

    given = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(attention, given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 24, 64])
def test_backward_is_the_reference_s(device, dtype, head_dim):
    """The closed form against autograd of the float64 reference."""
    cu_inputs, cu_tapes, _ = layout(device, [64, 0, 33, 50], [5, 7, 0, 10])
    given = qkv(172, 3, head_dim, device=device, dtype=dtype)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)


def test_scores_beyond_the_range_of_exp(device):
    cu_inputs, cu_tapes, _ = layout(device)
    given = qkv(14, 2, 8, device=device)
    given[0] = given[0] * 1e4
    assert_matches_literal(*given[:3], cu_inputs, cu_tapes)
    for x in gradients(elastic_attention, *given, cu_inputs, cu_tapes):
        assert x.isfinite().all()


def test_scores_of_minus_infinity(device):
    """A tile of keys that no query wants, before others; and an example that has no other."""
    cu_inputs, cu_tapes, rows = layout(device, [140, 3], [2, 0])
    q, k, v, _ = qkv(145, 2, 8, device=device)
    q[..., 0] = 1
    k[rows[0][:70], :, 0] = k[rows[1], :, 0] = -math.inf
    actual = elastic_attention(q, k, v, cu_inputs, cu_tapes)
    expected = by_reference(q.double(), k.double(), v.double(), cu_inputs, cu_tapes)
    assert expected[rows[0]].isfinite().all() and expected[rows[1]].isnan().all()
    assert_close(actual, expected, 1e-5)


def test_strided_inputs_and_gradients(device):
    cu_inputs, cu_tapes, _ = layout(device)
    head_first = torch.randn(2, 15, 8, device=device).transpose(0, 1)
    q, k, v, _ = qkv(15, 2, 8, device=device)
    given = [head_first, k, v[::1].flip(-1), torch.tensor(1.5, device=device).expand(15, 2, 8)]
    assert not given[0].is_contiguous() and not given[1].is_contiguous()
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    copies = [x.contiguous() for x in given]
    for a, e in zip(
        actual, gradients(elastic_attention, *copies, cu_inputs, cu_tapes), strict=True
    ):
        assert_same_bits(a, e)
        assert a.is_contiguous()

    leaf = torch.stack([q, k, v], 1).requires_grad_()
    elastic_attention(*leaf.unbind(1), cu_inputs, cu_tapes).sum().backward()
    ones = torch.ones(15, 2, 8, device=device)
    _, *expected = gradients(elastic_attention, q, k, v, ones, cu_inputs, cu_tapes)
    assert_same_bits(leaf.grad, torch.stack(expected, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    """Beside torch's own attention in `dtype`, one example at a time.

    Its fused form keeps the weights in float32 on the CPU. Tensor cores take them rounded, as do
    torch's products one by one.
    """
    cu_inputs, cu_tapes, rows = layout(device, [50, 0, 33], [6, 9, 0])
    given = qkv(98, 4, 32, device=device, dtype=dtype)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    exact = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)

    def unfused(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    fused = unfused if current_backend() == "triton" else F.scaled_dot_product_attention

    def plain(q, k, v):
        out = torch.zeros_like(q)
        for own in rows:
            one = fused(*(x[own].transpose(0, 1) for x in (q, k, v)))
            out = out.index_copy(0, torch.tensor(own, device=device), one.transpose(0, 1))
        return out

    rounded = gradients(plain, *given)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == dtype
        assert_low_precision(a, r, e, floor=1e-6)


@pytest.mark.parametrize("unused", [0, 4])
@pytest.mark.parametrize(
    ("input_lens", "tape_lens"),
    [([], []), ([0], [0]), ([0, 0, 0], [0, 0, 0]), ([0, 2], [0, 0]), ([0, 0], [0, 3])],
)
def test_empty(device, input_lens, tape_lens, unused):
    cu_inputs, cu_tapes, _ = layout(device, input_lens, tape_lens)
    used = sum(input_lens) + sum(tape_lens)
    given = qkv(used + unused, 2, 4, device=device)
    assert_matches_literal(*given[:3], cu_inputs, cu_tapes)
    for x in gradients(elastic_attention, *given, cu_inputs, cu_tapes):
        assert x.shape == (used + unused, 2, 4)
        assert not x[used:].any() and x.isfinite().all()
