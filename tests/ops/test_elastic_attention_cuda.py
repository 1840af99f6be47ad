"""Attention in CUDA C++ where it serves: heads of 64, max_rows up to 512."""

import math
import mmap

import literal
import pytest
import torch
from attention_cases import by_reference, gradients, layout, most_rows_on, qkv
from checks import assert_close, assert_low_precision, assert_same_bits, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st

from adatape_kernels import reference
from adatape_kernels.ops import elastic_attention

OP, DTYPE = "elastic_attention", torch.float16
pytestmark = pytest.mark.backends("cuda")

DTYPES = [torch.float16, torch.bfloat16]
HEAD_DIM = 64


def unfused(q, k, v, scale):
    """Attention as torch's products one by one round it; (num_heads, rows, head_dim)."""
    return torch.softmax(q @ k.mT * scale, -1) @ v


def by_example(rows, attention=unfused):
    """The same over the rows of each example."""

    def run(q, k, v, *offsets, softmax_scale=None):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out = torch.zeros_like(q)
        for own in filter(None, rows):
            one = attention(*(x[own].transpose(0, 1) for x in (q, k, v)), scale)
            out = out.index_copy(0, torch.tensor(own, device=q.device), one.transpose(0, 1))
        return out

    return run


def assert_right(given, offsets, rows, **options):
    """Example by example no less exact than twice what plain torch is; zeros in unused rows."""
    actual = gradients(elastic_attention, *given, *offsets, **options)
    options.pop("max_rows")
    exact = gradients(by_reference, *(x.double() for x in given), *offsets, **options)
    plain = gradients(by_example(rows), *given, *offsets, **options)
    used = sum(map(len, rows))
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert a.dtype == given[0].dtype and a.is_contiguous()
        assert not a[used:].any()
        for own in filter(None, rows):
            floor = torch.finfo(a.dtype).eps / 4 * e[own].abs().max() + 1e-5
            assert_low_precision(a[own], p[own], e[own], floor)


@pytest.mark.few_emulated_threads
def test_matches_the_literal_loop(device):
    """A row more than a warp's tile, in two ranges; and a short example."""
    *offsets, _ = layout(device, [30, 2], [3, 0])
    given = qkv(36, 1, HEAD_DIM, device=device, dtype=torch.float16)
    expected = literal.elastic_attention(*(x.tolist() for x in (*given[:3], *offsets)), 0.125)
    actual = gradients(elastic_attention, *given, *offsets, max_rows=33)
    assert_close(actual[0], torch.tensor(expected).view(given[0].shape), 1e-3)
    wide = gradients(by_reference, *(x.double() for x in given), *offsets)
    for a, e in zip(actual, wide, strict=True):
        assert_close(a, e, 1e-3)


# On both sides of the bounds of tiles, with tapes that start inside one.
INPUT_LENS = [1, 13, 16, 0, 0, 31, 30, 33, 60, 64, 50, 1]
TAPE_LENS = [0, 2, 0, 17, 0, 0, 2, 0, 3, 0, 15, 0]


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail_of_tiles(device, dtype, scale):
    *offsets, rows = layout(device, INPUT_LENS, TAPE_LENS)
    given = qkv(sum(map(len, rows)) + 3, 2, HEAD_DIM, device=device, dtype=dtype)
    assert_right(given, offsets, rows, max_rows=65, softmax_scale=scale)


@pytest.mark.many_emulated_threads
@pytest.mark.parametrize(("dtype", "lens"), [(DTYPES[0], [512, 5]), (DTYPES[1], [207, 257])])
def test_examples_of_many_tiles(device, dtype, lens):
    """Several tiles a warp, and more warps for more rows; the longest that the device serves."""
    lens = [min(n, most_rows_on(device)) for n in lens]
    *offsets, rows = layout(device, [n - n // 30 for n in lens], [n // 30 for n in lens])
    given = qkv(sum(lens), 1, HEAD_DIM, device=device, dtype=dtype)
    assert_right(given, offsets, rows, max_rows=max(lens))


@given(data=st.data())
@settings(max_examples=15)
def test_any_lengths(device, data):
    batch, lens = data.draw(st.integers(0, 4)), st.integers(0, 40)
    input_lens, tape_lens = (
        data.draw(st.lists(lens, min_size=batch, max_size=batch)) for _ in range(2)
    )
    unused, num_heads = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 3))
    *offsets, rows = layout(device, input_lens, tape_lens)
    dtype = data.draw(st.sampled_from(DTYPES))
    given = qkv(sum(map(len, rows)) + unused, num_heads, HEAD_DIM, device=device, dtype=dtype)
    longest = max(map(len, rows), default=0)
    actual = gradients(elastic_attention, *given, *offsets, max_rows=longest)
    if not any(map(len, rows)) or num_heads == 0:
        for a in actual:
            assert_same_bits(a, torch.zeros_like(a))
        return
    assert_right(given, offsets, rows, max_rows=longest)


def test_scores_beyond_the_range_of_exp(device):
    *offsets, _ = layout(device, [20, 3], [5, 0])
    q, k, v, dout = qkv(28, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
    actual = gradients(elastic_attention, q * 1e4, k, v, dout, *offsets, max_rows=25)
    expected = by_reference(q.double() * 1e4, k.double(), v.double(), *offsets)
    assert_close(actual[0], expected, 1e-2)
    assert all(x.isfinite().all() for x in actual)


def test_scores_of_minus_infinity(device):
    """A step of keys that no query wants, before others; and an example that has no other."""
    *offsets, rows = layout(device, [50, 3], [2, 0])
    q, k, v, _ = qkv(55, 2, HEAD_DIM, device=device, dtype=torch.float16)
    q[..., 0] = 1
    k[rows[0][:40], :, 0] = k[rows[1], :, 0] = -math.inf
    actual = elastic_attention(q, k, v, *offsets, max_rows=52)
    expected = by_reference(q.double(), k.double(), v.double(), *offsets)
    assert expected[rows[0]].isfinite().all() and expected[rows[1]].isnan().all()
    assert_close(actual, expected, 1e-3)


@pytest.mark.many_emulated_threads
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_s_bits_do_not_depend_on_its_batch(device, dtype):
    """Nor on its place in it, nor on max_rows, nor on NaN in unused rows."""
    input_lens, tape_lens = [1, 17, 0, 70, 64, 50], [0, 10, 5, 7, 0, 1]
    *offsets, rows = layout(device, input_lens, tape_lens)
    given = qkv(sum(input_lens) + sum(tape_lens), 2, HEAD_DIM, device=device, dtype=dtype)
    together = gradients(elastic_attention, *given, *offsets, max_rows=77)
    for order in ([3, 0, 2, 5, 1, 4], [4, 3], *([i] for i in range(6))):
        *offsets, own = layout(
            device, [input_lens[i] for i in order], [tape_lens[i] for i in order]
        )
        there = [0] * sum(map(len, own))
        for i, example in zip(order, own, strict=True):
            for here, row in zip(example, rows[i], strict=True):
                there[here] = row
        chosen = [torch.cat([x[there], torch.full_like(x[:2], math.nan)]) for x in given]
        for max_rows in (max(map(len, own)), most_rows_on(device)):
            actual = gradients(elastic_attention, *chosen, *offsets, max_rows=max_rows)
            for a, e in zip(actual, together, strict=True):
                assert_same_bits(a[: len(there)], e[there])
                assert not a[len(there) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_with_its_example(device, dtype):
    """NaN in the rows of examples 0 and 2 and in unused rows, gradient included."""
    *offsets, rows = layout(device, [4, 30, 17, 1], [2, 3, 0, 0])
    given = qkv(60, 2, HEAD_DIM, device=device, dtype=dtype)
    clean = gradients(elastic_attention, *given, *offsets, max_rows=33)
    others = rows[1] + rows[3]
    for x in given:
        x[rows[0]] = x[rows[2]] = x[57:] = math.nan
    dirty = gradients(elastic_attention, *given, *offsets, max_rows=33)
    for a, e in zip(dirty, clean, strict=True):
        assert_same_bits(a[others], e[others])
        assert a[rows[0]].isnan().all() and a[rows[2]].isnan().all() and not a[57:].any()


def test_lse_is_the_reference_s(device):
    *offsets, _ = layout(device, [4, 30, 17, 0], [2, 3, 0, 0])
    q, k, v, _ = qkv(60, 2, HEAD_DIM, device=device, dtype=torch.float16)
    _, lse = torch.ops.adatape.elastic_attention(q, k, v, *offsets, 33, None)
    _, expected = reference.elastic_attention(q.double(), k.double(), v.double(), *offsets)
    assert lse.dtype == torch.float32 and lse.shape == (2, 60)
    assert_close(lse, expected, 1e-6)
    assert not lse[:, 56:].any()


def test_layouts(device):
    """Of inputs and gradients; where no row starts at a multiple of 16 bytes too."""
    *offsets, _ = layout(device, [20, 3], [5, 0])
    given = qkv(29, 2, HEAD_DIM, device=device, dtype=torch.float16)
    given[3] = torch.tensor(1.5, dtype=torch.float16, device=device).expand(29, 2, HEAD_DIM)
    expected = gradients(elastic_attention, *(x.contiguous() for x in given), *offsets, max_rows=25)
    behind = torch.zeros(29 * 2 * HEAD_DIM + 1, dtype=torch.float16, device=device)[1:]
    given[0] = behind.copy_(given[0].flatten()).view(29, 2, HEAD_DIM)
    given[1] = given[1].transpose(0, 1).contiguous().transpose(0, 1)
    given[2] = given[2].flip(-1).contiguous().flip(-1)
    for a, e in zip(
        gradients(elastic_attention, *given, *offsets, max_rows=25), expected, strict=True
    ):
        assert_same_bits(a, e)


def test_rows_past_2_to_the_31st_element(device):
    """Three rows so far apart; of the host's memory only what is touched is taken."""
    row, rows, num_heads = 2**30, 3, 2
    size = 3 * num_heads * HEAD_DIM
    last = (rows - 1) * row + size
    if device == "cpu":
        memory = mmap.mmap(-1, 2 * last, flags=mmap.MAP_PRIVATE | 0x4000)
        apart = torch.frombuffer(memory, dtype=torch.float16)
    else:
        apart = torch.empty(last, dtype=torch.float16, device=device)
    apart = apart.as_strided((rows, 3, num_heads, HEAD_DIM), (row, size // 3, HEAD_DIM, 1))
    near = torch.randn(rows, 3, num_heads, HEAD_DIM, device=device).half()
    apart.copy_(near)
    *offsets, _ = layout(device, [1, 1], [0, 1])
    dout = torch.ones(rows, num_heads, HEAD_DIM, device=device).half()
    actual, expected = (
        gradients(elastic_attention, *x.unbind(1), dout, *offsets, max_rows=2)
        for x in (apart, near)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.needs_sanitizer
@pytest.mark.runs_no_op
@pytest.mark.parametrize(
    ("cu_inputs", "cu_tapes"),
    [
        ([0, 7, 3], [3, 40, 1000]),
        ([5, -9, 60], [-70, 2**31 - 1, -(2**31)]),
        ([-(2**31), 2**31 - 1, 50], [2**31 - 1, -(2**31), 50]),
        ([10**9, 10**9, 10**9], [10**9, 10**9, 10**9]),
    ],
)
def test_corrupt_offsets_stay_inside(device, cu_inputs, cu_tapes):
    """Nobody can check offsets on a GPU without a copy; at worst the result is meaningless."""
    q, k, v, dout = qkv(50, 1, HEAD_DIM, device=device, dtype=torch.float16)
    offsets = [torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_inputs, cu_tapes)]
    out, lse = torch.ops.adatape_cuda.elastic_attention(q, k, v, *offsets, 20, None)
    torch.ops.adatape_cuda.elastic_attention_bwd(dout, q, k, v, out, lse, *offsets, 20, None)


@pytest.mark.runs_no_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_longer_than_max_rows_turns_nan(device, dtype):
    """Where nobody looks at the offsets, as on a GPU: what lies behind the bound, up to a step, and
    all gradients. Its neighbours are as ever."""
    *offsets, rows = layout(device, [4, 30, 17, 0], [2, 7, 0, 0])
    q, k, v, dout = qkv(62, 2, HEAD_DIM, device=device, dtype=dtype)
    kernels, backward = torch.ops.adatape_cuda, torch.ops.adatape_cuda.elastic_attention_bwd
    whole = kernels.elastic_attention(q, k, v, *offsets, 37, None)
    cut = kernels.elastic_attention(q, k, v, *offsets, 20, None)
    expected = whole[0], *backward(dout, q, k, v, *whole, *offsets, 37, None)
    actual = cut[0], *backward(dout, q, k, v, *whole, *offsets, 20, None)
    others = rows[0] + rows[2]
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert e.isfinite().all()
        assert_same_bits(a[others], e[others])
        assert a[rows[1][0 if n else 32 :]].isnan().all() and not a[60:].any()


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(device, requires_grad):
    *offsets, _ = layout(device, [4, 30, 0], [2, 3, 0])
    q, k, v, dout = qkv(40, 2, HEAD_DIM, device=device, dtype=torch.float16)
    given = [x.clone().requires_grad_(requires_grad) for x in (q, k, v)]
    args = (*given, *offsets, 33, None)
    opcheck(torch.ops.adatape.elastic_attention.default, args)
    out, lse = torch.ops.adatape.elastic_attention(q, k, v, *offsets, 33, None)
    args = (dout, q, k, v, out, lse, *offsets, 33, 0.5)
    opcheck(torch.ops.adatape.elastic_attention_bwd.default, args)


@pytest.mark.compiles
def test_compiles_once_for_all_sizes(device, fresh_compiler):
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(*args, max_rows):
        return elastic_attention(*args, max_rows=max_rows)

    for n, (input_lens, tape_lens) in enumerate([([4, 3], [2, 30]), ([5, 1, 9], [2, 0, 4])]):
        *offsets, rows = layout(device, input_lens, tape_lens)
        given = qkv(sum(map(len, rows)) + n, 2, HEAD_DIM, device=device, dtype=torch.float16)
        longest = max(map(len, rows))
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, *given, *offsets, max_rows=longest)
        expected = gradients(elastic_attention, *given, *offsets, max_rows=longest)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
