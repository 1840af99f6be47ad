import math

import literal
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_low_precision, assert_same_bits, interpreted, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels import reference
from adatape_kernels.offsets import cumulative
from adatape_kernels.ops import elastic_attention, triton_runtime
from adatape_kernels.ops.elastic_attention.triton_primitives import find_tile, num_tiles, tile_rows
from adatape_kernels.ops.op import current_backend
from adatape_kernels.ops.triton_runtime import tl, triton

OP = "elastic_attention"
INPUT_LENS, TAPE_LENS = [4, 0, 3, 1, 0], [2, 3, 0, 1, 0]


pytestmark = pytest.mark.usefixtures("not_handed_over")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 33), (6, 64)])
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, dtype, shape):
    """Alone, in the batch and in the permuted batch, output and gradients."""
    if current_backend() == "triton" and threads == 2:
        pytest.skip("triton's kernels do not use torch's threads")
    input_lens, tape_lens = [1, 17, 0, 197, 64, 50, 3], [0, 10, 5, 7, 0, 1, 1]
    if interpreted(device):
        input_lens[3], shape = 100, (min(shape[0], 2), shape[1])
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


# One, and on both sides of the bounds of 16, 32, 48, 64, 80, 96 and 128 rows.
AROUND_TILES = (
    [1, 13, 16, 0, 31, 32, 40, 48, 49, 60, 64, 64, 79, 81, 96, 128, 120],
    [0, 2, 0, 17, 0, 1, 7, 0, 0, 3, 0, 1, 1, 0, 1, 0, 9],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_every_tail_of_tiles(device, head_dim, dtype):
    cu_inputs, cu_tapes, rows = layout(device, *AROUND_TILES)
    used = sum(map(len, rows))
    given = qkv(used + 70, 1, head_dim, device=device, dtype=dtype)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)
        assert not a[used:].any()


@pytest.mark.parametrize("head_dim", [160, 257])
def test_wide_heads(device, head_dim):
    cu_inputs, cu_tapes, _ = layout(device, [20, 1], [20, 2])
    given = qkv(44, 2, head_dim, device=device)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


def test_one_long_example_beside_short_ones(device):
    """Whatever bound is given, to the bit."""
    cu_inputs, cu_tapes, _ = layout(device, [2, 290, 0, 1, 5], [0, 11, 1, 0, 3])
    given = qkv(315, 1, 8, device=device)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)
    for max_rows in (301, 10_000):
        bounded = gradients(elastic_attention, *given, cu_inputs, cu_tapes, max_rows=max_rows)
        for a, e in zip(bounded, actual, strict=True):
            assert_same_bits(a, e)


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


@triton.jit
def _find_tiles_kernel(
    cu_inputs_ptr, cu_tapes_ptr, out_ptr, rows, batch, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    number = tl.program_id(0)
    example, tile, place = find_tile(number, cu_inputs_ptr, cu_tapes_ptr, rows, batch, BLOCK, WIDTH)
    row, mask = tile_rows(place, tl.maximum(tile, 0) * BLOCK, BLOCK)
    out_ptrs = out_ptr + number * (BLOCK + 1) + tl.arange(0, BLOCK)
    tl.store(out_ptrs, tl.where(mask & (tile >= 0), row, -1))
    tl.store(out_ptr + number * (BLOCK + 1) + BLOCK, example)


def find_tiles(cu_inputs, cu_tapes, rows, block, width):
    """What `find_tile` says of all numbers: the rows, -1 where there is none, and the example."""
    batch = len(cu_inputs) - 1
    out = cu_inputs.new_zeros(num_tiles(rows, batch, block), block + 1)
    given = (cu_inputs, cu_tapes, out, rows, batch, block, width)
    triton_runtime.launch(_find_tiles_kernel, (len(out),), *given)
    return out.cpu()


needs_triton = pytest.mark.skipif(
    not (triton_runtime.INTERPRETED or torch.cuda.is_available()),
    reason="nothing runs triton's kernels",
)


@needs_triton
@pytest.mark.parametrize("batch", [0, 1, 4, 5, 70])
@pytest.mark.parametrize("unused", [0, 21])
def test_every_row_is_in_one_tile(batch, unused):
    """For batches that take one to four rounds of the search."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    input_lens, tape_lens = torch.randint(0, 12, (2, batch)).tolist()
    input_lens[1:3] = [0, 40][: max(0, batch - 1)]
    cu_inputs, cu_tapes, owned = layout(device, input_lens, tape_lens)
    used = sum(input_lens) + sum(tape_lens)
    owned.append([*range(used, used + unused)])
    found = find_tiles(cu_inputs, cu_tapes, used + unused, block=8, width=4)
    tiles = [
        (example, own[start : start + 8])
        for example, own in enumerate(owned)
        for start in range(0, len(own), 8)
    ]
    for *own, example in found.tolist():
        if own[0] >= 0:
            assert (example, [row for row in own if row >= 0]) == tiles.pop(0)
    assert not tiles


@needs_triton
@pytest.mark.parametrize(
    ("cu_inputs", "cu_tapes"),
    [
        ([0, 7, 3], [3, 40, 1000]),
        ([5, -9, 60], [-70, 2**31 - 1, -(2**31)]),
        ([-(2**31), 2**31 - 1, 50], [2**31 - 1, -(2**31), 50]),
        ([10**9, 10**9, 10**9], [10**9, 10**9, 10**9]),
        ([-5, -5, -5], [-5, -5, -5]),
    ],
)
def test_corrupt_offsets_stay_inside(cu_inputs, cu_tapes):
    """Nobody can check offsets on a GPU without a copy; at worst the result is meaningless."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_inputs, cu_tapes = (torch.tensor(x, dtype=torch.int32) for x in (cu_inputs, cu_tapes))
    found = find_tiles(cu_inputs.to(device), cu_tapes.to(device), 50, block=8, width=4)
    assert found[:, :-1].min() >= -1 and found[:, :-1].max() < 50
    assert found[:, -1].min() >= 0 and found[:, -1].max() <= 2


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
