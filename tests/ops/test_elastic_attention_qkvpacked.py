"""`elastic_attention_qkvpacked`: the bits of `elastic_attention`, and one gradient."""

import math

import literal
import pytest
import torch
import torch.nn.functional as F
from attention_cases import INPUT_LENS, TAPE_LENS, layout, not_served
from checks import assert_close, assert_same_bits, opcheck
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels import reference
from adatape_kernels.ops import (
    elastic_attention,
    elastic_attention_qkvpacked,
    fast_autograd,
    varlen_attention,
    varlen_attention_qkvpacked,
)
from adatape_kernels.ops.op import operation

OP, DTYPE = "elastic_attention_qkvpacked", {"cuda": torch.float16}
pytestmark = pytest.mark.absent_if(reason=not_served)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def projected(rows, num_heads, head_dim, *, device, dtype=torch.float32):
    """qkv, and a gradient of the result."""
    qkv = torch.randn(rows, 3, num_heads, head_dim, device=device).to(dtype)
    return qkv, torch.randn(rows, num_heads, head_dim, device=device).to(dtype)


def apart(qkv, *args, **options):
    return elastic_attention(*qkv.unbind(1), *args, **options)


def with_gradient(attention, qkv, dout, *args, **options):
    """out and dqkv."""
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, *args, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def assert_same_as_apart(qkv, dout, *args, **options):
    actual = with_gradient(elastic_attention_qkvpacked, qkv, dout, *args, **options)
    for a, e in zip(actual, with_gradient(apart, qkv, dout, *args, **options), strict=True):
        assert_same_bits(a, e)
        assert a.is_contiguous()


@pytest.mark.parametrize("unused", [0, 3])
def test_matches_the_literal_loop(device, unused):
    cu_inputs, cu_tapes, _ = layout(device)
    qkv, _ = projected(14 + unused, 3, 8, device=device)
    out = elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, softmax_scale=0.3)
    lists = (x.tolist() for x in (*qkv.unbind(1), cu_inputs, cu_tapes))
    expected = torch.tensor(literal.elastic_attention(*lists, 0.3), dtype=torch.float64)
    assert_close(out, expected.view(out.shape), 1e-5)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("max_rows", [60])
@pytest.mark.parametrize("head_dim", [1, 5, 24, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_three_tensors(device, dtype, head_dim, max_rows):
    """At every width of a head, also where k and v do not begin at whole accesses."""
    cu_inputs, cu_tapes, _ = layout(device, [33, 0, 2], [3, 4, 0])
    given = projected(42 + 2, 3, head_dim, device=device, dtype=dtype)
    assert_same_as_apart(*given, cu_inputs, cu_tapes, max_rows=max_rows, softmax_scale=0.2)


@pytest.mark.backends("cuda")
@pytest.mark.runs_no_op  # the dispatcher refuses these lengths where it sees them
@pytest.mark.parametrize("max_rows", [40])
@pytest.mark.parametrize("head_dim", [64])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_an_example_that_exceeds_max_rows_spoils_no_other(device, dtype, head_dim, max_rows):
    """The gradients of a head lie among those of others, all of which stay what they are."""
    cu_inputs, cu_tapes, rows = layout(device, [50, 3], [5, 4])
    qkv, dout = projected(64, 2, head_dim, device=device, dtype=dtype)
    options = cu_inputs, cu_tapes, max_rows, None
    forward, backward = (operation(op).implementations["cuda"] for op in (OP, f"{OP}_bwd"))
    results = forward.function(qkv, *options)
    dqkv = backward.function(dout, qkv, *results, *options)
    assert dqkv[rows[0]].isnan().all() and dqkv[rows[1]].isfinite().all()
    assert not dqkv[62:].any()


@st.composite
def ragged(draw):
    batch, lens = draw(st.integers(0, 4)), st.integers(0, 4)
    input_lens, tape_lens = (draw(st.lists(lens, min_size=batch, max_size=batch)) for _ in range(2))
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 9))
    return input_lens, tape_lens, draw(st.integers(0, 2)), shape


@pytest.mark.backends("eager", "cpp")
@given(case=ragged())
def test_any_lengths_give_the_bits_of_three_tensors(device, case):
    input_lens, tape_lens, unused, shape = case
    cu_inputs, cu_tapes, _ = layout(device, input_lens, tape_lens)
    given = projected(sum(input_lens) + sum(tape_lens) + unused, *shape, device=device)
    assert_same_as_apart(*given, cu_inputs, cu_tapes)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype):
    cu_inputs, cu_tapes, _ = layout(device, INPUT_LENS[2:], TAPE_LENS[2:])
    qkv, _ = projected(6, 2, 3, device=device, dtype=dtype)

    def attention(qkv):
        return elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, softmax_scale=0.4)

    qkv.requires_grad_()
    assert torch.autograd.gradcheck(attention, qkv, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention, qkv)


@pytest.mark.skipif(
    not fast_autograd.SINGLE_LEVEL, reason="this torch applies autograd functions in C++"
)
@pytest.mark.backends("eager", "cpp")
def test_the_gradient_s_gradient_by_vmap_and_by_loop(device):
    """The backward op, which has one result, under vmap and in forward mode."""
    cu_inputs, cu_tapes, _ = layout(device)
    qkv, dout = projected(15, 2, 4, device=device, dtype=torch.float32)
    douts = torch.stack([dout, 2 * dout, dout.flip(0)])

    def gradient(dout):
        return torch.func.vjp(lambda x: elastic_attention_qkvpacked(x, cu_inputs, cu_tapes), qkv)[
            1
        ](dout)[0]

    for a, one in zip(torch.func.vmap(gradient)(douts), douts, strict=True):
        assert_same_bits(a, gradient(one))
    _, tangent = torch.func.jvp(gradient, (dout,), (douts[2],))
    assert_close(tangent, gradient(douts[2]).double(), 1e-4)  # it is linear in dout


def test_an_example_s_bits_do_not_depend_on_its_batch(device):
    input_lens, tape_lens = [1, 17, 0, 64, 3], [0, 10, 5, 7, 1]
    cu_inputs, cu_tapes, rows = layout(device, input_lens, tape_lens)
    given = projected(sum(input_lens) + sum(tape_lens), 2, 8, device=device)
    together = with_gradient(elastic_attention_qkvpacked, *given, cu_inputs, cu_tapes)
    for i in range(5):
        offsets = layout(device, input_lens[i : i + 1], tape_lens[i : i + 1])[:2]
        own = rows[i]
        chosen = [F.pad(x[own], (0, 0) * (x.dim() - 1) + (0, 2), value=math.nan) for x in given]
        actual = with_gradient(elastic_attention_qkvpacked, *chosen, *offsets)
        for a, e in zip(actual, together, strict=True):
            assert_same_bits(a[: len(own)], e[own])
            assert not a[len(own) :].any()


def test_poison_stays_with_its_example(device):
    cu_inputs, cu_tapes, rows = layout(device)
    given = projected(17, 2, 8, device=device)
    poisoned = [x.clone() for x in given]
    for x in poisoned:
        x[rows[2]] = x[14:] = math.nan
    others = rows[0] + rows[1] + rows[3]
    clean = with_gradient(elastic_attention_qkvpacked, *given, cu_inputs, cu_tapes)
    dirty = with_gradient(elastic_attention_qkvpacked, *poisoned, cu_inputs, cu_tapes)
    for a, e in zip(dirty, clean, strict=True):
        assert_same_bits(a[others], e[others])
        assert not a[14:].any() and not e[14:].any()


@pytest.mark.compiles
@pytest.mark.parametrize("batch", [0, 5])
def test_opcheck(device, batch):
    cu_inputs, cu_tapes, rows = layout(device, INPUT_LENS[:batch], TAPE_LENS[:batch])
    qkv, dout = projected(sum(map(len, rows)) + 1, 2, 4, device=device)
    args = (qkv.requires_grad_(), cu_inputs, cu_tapes, 9, None)
    opcheck(torch.ops.adatape.elastic_attention_qkvpacked.default, args)
    out, lse = reference.elastic_attention(*qkv.detach().unbind(1), cu_inputs, cu_tapes)
    args = (dout, qkv.detach(), out, lse, cu_inputs, cu_tapes, None, 0.5)
    opcheck(torch.ops.adatape.elastic_attention_qkvpacked_bwd.default, args)


@pytest.mark.compiles
@pytest.mark.backends("eager", "cpp")
def test_compiles_once_for_all_sizes(fresh_compiler, device):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(qkv, cu_inputs, cu_tapes, max_rows):
        return elastic_attention_qkvpacked(qkv, cu_inputs, cu_tapes, max_rows=max_rows)

    sizes = [([4, 3, 6], [2, 0, 1], 5, 8, 11), ([5, 1], [2, 9], 4, 12, 10), ([2], [0], 2, 4, 7)]
    for n, (input_lens, tape_lens, num_heads, head_dim, max_rows) in enumerate(sizes):
        cu_inputs, cu_tapes, _ = layout(device, input_lens, tape_lens)
        rows = sum(input_lens) + sum(tape_lens) + n
        given = [*projected(rows, num_heads, head_dim, device=device), cu_inputs, cu_tapes]
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = with_gradient(compiled, *given, max_rows=max_rows)
        for a, e in zip(actual, with_gradient(apart, *given), strict=True):
            assert_same_bits(a, e)


def test_counted_flops_are_those_of_three_tensors(device):
    cu_inputs, cu_tapes, _ = layout(device)
    given = projected(17, 3, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        with_gradient(elastic_attention_qkvpacked, *given, cu_inputs, cu_tapes)
    assert counter.get_total_flops() == 7 * 2 * 58 * 3 * 8


def test_sequences_without_tapes(device):
    cu_seqlens = torch.tensor([0, 4, 4, 9], device=device)
    given = projected(10, 2, 8, device=device)
    actual = with_gradient(varlen_attention_qkvpacked, *given, cu_seqlens, 5, softmax_scale=0.3)

    def three(qkv, *args, **options):
        return varlen_attention(*qkv.unbind(1), *args, **options)

    expected = with_gradient(three, *given, cu_seqlens, 5, softmax_scale=0.3)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
