import math

import literal
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_low_precision, assert_same_bits, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels import reference
from adatape_kernels.elastic import cumulative
from adatape_kernels.ops import elastic_attention

OP = "elastic_attention"
INPUT_LENS, TAPE_LENS = [4, 0, 3, 1, 0], [2, 3, 0, 1, 0]


def layout(device, input_lens=INPUT_LENS, tape_lens=TAPE_LENS, unused=0):
    """cu_inputs, cu_tapes, and the physical rows of each example."""
    cu_inputs = cumulative(torch.tensor(input_lens, dtype=torch.int32, device=device))
    tapes = torch.tensor(tape_lens, dtype=torch.int32, device=device)
    cu_tapes = cumulative(tapes, start=sum(input_lens))
    rows, (a, b) = [], (cu_inputs.tolist(), cu_tapes.tolist())
    for i in range(len(input_lens)):
        rows.append([*range(a[i], a[i + 1]), *range(b[i], b[i + 1])])
    return cu_inputs, cu_tapes, rows


def qkv(rows, num_heads, head_dim, *, device, dtype=torch.float32):
    """Strided views of one product, as the layer has them, and a gradient of the output."""
    together = torch.randn(rows, 3, num_heads, head_dim, device=device).to(dtype)
    dout = torch.randn(rows, num_heads, head_dim, device=device).to(dtype)
    return [*together.unbind(1), dout]


def gradients(attention, q, k, v, dout, *offsets, **options):
    """out, dq, dk and dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, *offsets, **options)
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], dout)]


def by_reference(*args, **options):
    return reference.elastic_attention(*args, **options)[0]


def assert_matches_literal(q, k, v, cu_inputs, cu_tapes, softmax_scale=None, **options):
    out = elastic_attention(q, k, v, cu_inputs, cu_tapes, softmax_scale=softmax_scale, **options)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    expected = literal.elastic_attention(
        *(x.tolist() for x in (q, k, v, cu_inputs, cu_tapes)), scale
    )
    assert out.dtype == q.dtype and out.is_contiguous()
    assert_close(out, torch.tensor(expected, dtype=torch.float64).view(q.shape), 1e-5)


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
    """Beside torch's own attention in `dtype`, one example at a time."""
    cu_inputs, cu_tapes, rows = layout(device, [50, 0, 33], [6, 9, 0])
    given = qkv(98, 4, 32, device=device, dtype=dtype)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    exact = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)

    def plain(q, k, v):
        out = torch.zeros_like(q)
        for own in rows:
            one = F.scaled_dot_product_attention(*(x[own].transpose(0, 1) for x in (q, k, v)))
            out = out.index_copy(0, torch.tensor(own, device=device), one.transpose(0, 1))
        return out

    rounded = gradients(plain, *given)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == dtype
        assert_low_precision(a, r, e, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 33), (6, 64)])
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, dtype, shape):
    """Alone, in the batch and in the permuted batch, output and gradients."""
    input_lens, tape_lens = [1, 17, 0, 197, 64, 50, 3], [0, 10, 5, 7, 0, 1, 1]
    cu_inputs, cu_tapes, rows = layout(device, input_lens, tape_lens)
    given = qkv(sum(input_lens) + sum(tape_lens), *shape, device=device, dtype=dtype)
    together = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    for order in ([3, 0, 6, 2, 5, 1, 4], [4, 3], *([i] for i in range(7))):
        offsets = layout(device, [input_lens[i] for i in order], [tape_lens[i] for i in order])
        inputs = [r for i in order for r in rows[i][: input_lens[i]]]
        own = inputs + [r for i in order for r in rows[i][input_lens[i] :]]
        chosen = [F.pad(x[own], (0, 0, 0, 0, 0, 2), value=math.nan) for x in given]
        actual = gradients(elastic_attention, *chosen, *offsets[:2])
        for a, e in zip(actual, together, strict=True):
            assert_same_bits(a[: len(own)], e[own])


@pytest.mark.parametrize("attention", [elastic_attention, by_reference], ids=["op", "reference"])
def test_poison_stays_with_its_example(device, attention):
    """NaN in example 2's rows and in unused rows, gradient included."""
    cu_inputs, cu_tapes, rows = layout(device)
    given = qkv(17, 2, 8, device=device)
    clean = gradients(attention, *given, cu_inputs, cu_tapes)
    poisoned = [x.clone() for x in given]
    for x in poisoned:
        x[rows[2]] = x[14:] = math.nan
    others = rows[0] + rows[1] + rows[3]
    dirty = gradients(attention, *poisoned, cu_inputs, cu_tapes)
    for a, e in zip(dirty, clean, strict=True):
        assert_same_bits(a[others], e[others])
        assert not a[14:].any() and not e[14:].any()
    assert dirty[0][rows[2]].isnan().all()


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


@pytest.mark.parametrize("max_rows", [None, 9])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [0, 5])
def test_opcheck(device, batch, requires_grad, max_rows):
    cu_inputs, cu_tapes, rows = layout(device, INPUT_LENS[:batch], TAPE_LENS[:batch])
    q, k, v, _ = qkv(sum(map(len, rows)) + 1, 2, 4, device=device)
    q, k, v = (x.requires_grad_(requires_grad) for x in (q, k, v))
    args = (q, k, v, cu_inputs, cu_tapes, max_rows, None)
    torch.library.opcheck(torch.ops.adatape.elastic_attention.default, args)


def test_opcheck_of_the_backward(device):
    cu_inputs, cu_tapes, _ = layout(device)
    q, k, v, dout = qkv(15, 2, 4, device=device)
    out, lse = reference.elastic_attention(q, k, v, cu_inputs, cu_tapes)
    args = (dout, q, k, v, out, lse, cu_inputs, cu_tapes, None, 0.5)
    torch.library.opcheck(torch.ops.adatape.elastic_attention_bwd.default, args)


def test_compiles_once_for_all_sizes(fresh_compiler, device):
    """Also for every max_rows, an int that would otherwise recompile for each of its values."""

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(q, k, v, cu_inputs, cu_tapes, max_rows):
        return elastic_attention(q, k, v, cu_inputs, cu_tapes, max_rows=max_rows)

    sizes = [([4, 3, 6], [2, 0, 1], 5, 8, 11), ([5, 1], [2, 9], 3, 12, 10), ([2], [0], 2, 4, 7)]
    for n, (input_lens, tape_lens, num_heads, head_dim, max_rows) in enumerate(sizes):
        cu_inputs, cu_tapes, _ = layout(device, input_lens, tape_lens)
        rows = sum(input_lens) + sum(tape_lens) + n
        given = [*qkv(rows, num_heads, head_dim, device=device), cu_inputs, cu_tapes]
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, *given, max_rows=max_rows)
        for a, e in zip(actual, gradients(elastic_attention, *given), strict=True):
            assert_same_bits(a, e)


def test_counted_flops_are_those_of_the_rows_that_exist(device):
    """Lengths 6, 3, 3, 2, 0: the sum of squares is 58; two products forward, five backward."""
    cu_inputs, cu_tapes, _ = layout(device)
    q, k, v, dout = qkv(17, 3, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        elastic_attention(q, k, v, cu_inputs, cu_tapes)
    assert counter.get_total_flops() == 2 * 2 * 58 * 3 * 8
    with FlopCounterMode(display=False) as counter:
        gradients(elastic_attention, q, k, v, dout, cu_inputs, cu_tapes)
    assert counter.get_total_flops() == 7 * 2 * 58 * 3 * 8


def offsets(*values, **options):
    return torch.tensor(values, dtype=torch.int32, **options)


GOOD = dict(
    q=torch.zeros(6, 2, 4),
    k=torch.zeros(6, 2, 4),
    v=torch.zeros(6, 2, 4),
    cu_inputs=offsets(0, 3, 4),
    cu_tapes=offsets(4, 4, 6),
)


@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("q", torch.zeros(6, 8), ["(rows, num_heads, head_dim)", "(6, 8)"]),
        ("q", torch.zeros(6, 2, 0), ["head_dim at least 1", "(6, 2, 0)"]),
        ("q", torch.zeros(6, 2, 4, dtype=torch.int32), ["floating-point", "int32"]),
        ("k", torch.zeros(5, 2, 4), ["(6, 2, 4)", "(5, 2, 4)"]),
        ("k", torch.zeros(6, 2, 4, dtype=torch.bfloat16), ["float32", "bfloat16"]),
        ("v", torch.zeros(6, 2, 5), ["(6, 2, 4)", "(6, 2, 5)"]),
        ("v", torch.zeros(6, 2, 4, device="meta"), ["cpu", "meta"]),
        ("cu_inputs", torch.tensor([0, 3, 4]), ["int32", "int64"]),
        ("cu_inputs", torch.zeros(1, 3, dtype=torch.int32), ["(batch + 1,)", "(1, 3)"]),
        ("cu_inputs", offsets(), ["(batch + 1,)", "(0,)"]),
        ("cu_inputs", offsets(0, 3, 4, device="meta"), ["cpu", "meta"]),
        ("cu_inputs", offsets(1, 3, 4), ["first offset", "0", "got 1"]),
        ("cu_inputs", offsets(0, 5, 4), ["ascending", "5 then 4 at 1, 2"]),
        ("cu_inputs", offsets(0, -1, 4), ["ascending", "0 then -1 at 0, 1"]),
        ("cu_inputs", offsets(0, 3, 7), ["at most 6", "got 7"]),
        ("cu_tapes", torch.tensor([4, 4, 6]), ["int32", "int64"]),
        ("cu_tapes", offsets(4, 6), ["(3,)", "(2,)"]),
        ("cu_tapes", offsets(4, 4, 6, device="meta"), ["cpu", "meta"]),
        ("cu_tapes", offsets(3, 4, 6), ["first offset", "4", "got 3"]),
        ("cu_tapes", offsets(0, 1, 2), ["first offset", "4", "got 0"]),
        ("cu_tapes", offsets(4, 6, 5), ["ascending", "6 then 5"]),
        ("cu_tapes", offsets(4, 4, 7), ["at most 6", "got 7"]),
        ("cu_tapes", offsets(4, 4, 2**31 - 1), ["at most 6", "got 2147483647"]),
        ("max_rows", 2, ["at least 3", "got 2"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        elastic_attention(**{**GOOD, argument: value})
