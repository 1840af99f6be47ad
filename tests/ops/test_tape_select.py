"""What `tape_select` reads: the SPEC's loop, ties, tiles, poison, and the ends of reading."""

import math

import pytest
import torch
from checks import assert_close, interpreted
from hypothesis import given
from hypothesis import strategies as st
from select_cases import INF, NAN, assert_matches_literal, read

from adatape_kernels import reference
from adatape_kernels.ops import tape_select, triton_runtime
from adatape_kernels.ops.tape_select import triton_forward, triton_tiled_bank

OP = "tape_select"


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
@pytest.mark.parametrize("topk", [1, 2, 5, 32])
def test_matches_the_literal_loop(device, topk, average_query, loss_type, shared):
    query = torch.randn(4, 6, device=device)
    keys = torch.randn(*([] if shared else [4]), 71, 6, device=device)
    sel = read(
        query,
        keys,
        num_tape_tokens=6,
        topk=topk,
        halt_threshold=1.9,
        average_query=average_query,
        loss_type=loss_type,
    )
    assert sel.counts.max() >= 2  # the recursion of the query was exercised


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_match_the_literal_loop(device, dtype):
    query = torch.randn(4, 16, device=device).to(dtype)
    keys = torch.randn(4, 30, 16, device=device).to(dtype)
    read(query, keys, num_tape_tokens=5, topk=3, halt_threshold=2.2)


def test_matches_the_float64_reference(device):
    query, keys = torch.randn(16, 64, device=device), torch.randn(16, 784, 64, device=device)
    options = dict(num_tape_tokens=10, topk=5, halt_threshold=4.0)
    sel = tape_select(query, keys, **options)
    expected = reference.tape_select(query.double(), keys.double(), **options)
    assert torch.equal(sel.indices, expected.indices)
    assert torch.equal(sel.counts, expected.counts)
    assert_close(sel.weights, expected.weights, 1e-5)
    assert_close(sel.ponder, expected.ponder, 1e-5)


@pytest.mark.parametrize("strides", ["cut", "transposed keys", "transposed query", "expanded"])
def test_strided_inputs(device, strides):
    query, keys = torch.randn(5, 8, device=device), torch.randn(5, 12, 8, device=device)
    if strides == "cut":  # as the layers do: the leading features of a bank token are its key
        query, keys = query[:, :6], keys[..., :6]
    elif strides == "transposed keys":
        keys = torch.randn(5, 8, 12, device=device).mT
    elif strides == "transposed query":
        query = torch.randn(8, 5, device=device).mT
    else:
        query, keys = query[:1].expand(5, 8), keys[:1].expand(5, 12, 8)
    read(query, keys, topk=3)


def test_reading_ends_when_the_bank_is_exhausted(device):
    query, keys = torch.randn(6, 4, device=device), torch.randn(6, 7, 4, device=device)
    lens = torch.tensor([7, 6, 5, 3, 2, 0], device=device)
    sel = read(query, keys, topk=3, bank_lens=lens)
    assert sel.counts.tolist() == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("lens_dtype", [torch.int32, torch.int64])
def test_read_mask_and_bank_lens(device, lens_dtype):
    query, keys = torch.randn(8, 5, device=device), torch.randn(40, 5, device=device)
    mask = torch.rand(8, 40, device=device) < torch.linspace(0, 1, 8, device=device)[:, None]
    lens = torch.randint(0, 41, (8,), dtype=lens_dtype, device=device)
    read(query, keys, topk=2, read_mask=mask)
    read(query, keys, topk=2, bank_lens=lens)
    sel = read(query, keys, topk=2, num_tape_tokens=30, read_mask=mask, bank_lens=lens)
    left = (~mask & (torch.arange(40, device=device) < lens[:, None])).sum(1)
    assert torch.equal(sel.counts, (left // 2).int())


@pytest.mark.parametrize("key_dim", [1, 3, 8, 64, 100])
@pytest.mark.parametrize("strides", ["contiguous", "cut", "transposed"])
def test_equal_rows_are_read_by_index(device, key_dim, strides):
    """Three distinct rows, as in the parity bank, at any position of a bank of 500."""
    batch = 2 if interpreted(device) else 4
    rows = torch.randn(3, key_dim + 3, device=device)
    keys = rows[torch.randint(0, 3, (batch, 500), device=device)][..., :key_dim]
    if strides != "cut":
        keys = keys.contiguous() if strides == "contiguous" else keys.mT.contiguous().mT
    read(torch.randn(batch, key_dim, device=device), keys, num_tape_tokens=8, topk=7)


def test_equal_rows_are_read_by_index_in_a_large_bank(device):
    rows = torch.randn(3, 48, device=device)
    query, kind = torch.randn(2, 48, device=device), torch.randint(0, 3, (20_011,), device=device)
    sel = tape_select(query, rows[kind], num_tape_tokens=3, topk=8, halt_threshold=INF)
    first = (query @ rows.mT).argmax(1)
    for i in range(2):
        entries = (kind == first[i]).nonzero().flatten()
        assert sel.indices[i, 0].tolist() == entries[:8].tolist()


def has_no_tiles(device, backend, small_tiles, dtype=None, **parameters):
    """For `absent_if`: the tiles are Triton's, whose interpreter meets each dtype in one size."""
    if backend != "triton":
        return None if small_tiles == 16 else "another backend has no such tiles"
    size = {torch.float32: 16, torch.float16: 64, None: small_tiles}[dtype]
    return None if size == small_tiles else f"tiles of {size} meet this dtype"


@pytest.fixture(params=[16, 64], ids=["tiles-of-16", "tiles-of-64"])
def small_tiles(request, monkeypatch):
    """Several tiles in a small bank, where a kernel has tiles."""
    config = triton_tiled_bank.tiled_bank_config

    def smaller(dtype, shape, topk, capability):
        tiles = 1 << (-(-shape[-2] // request.param) - 1).bit_length()
        sizes = {"BLOCK_M": request.param, "NUM_TILES": tiles}
        return {**config(dtype, shape, topk, capability), **sizes}

    monkeypatch.setattr(triton_tiled_bank, "tiled_bank_config", smaller)
    monkeypatch.setattr(triton_forward, "MOST_ENTRIES", 0)


@pytest.mark.absent_if(reason=has_no_tiles)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("topk", [1, 5, 32])
def test_several_tiles(small_tiles, device, topk, dtype, shared):
    """The best entries come from any tile, and a tile may be read until nothing is left of it."""
    query = torch.randn(3, 12, device=device).to(dtype)
    keys = torch.randn(*([] if shared else [3]), 200, 12, device=device).to(dtype)
    mask = torch.rand(3, 200, device=device) < 0.2
    mask[:, 16:32] = True
    lens = torch.tensor([200, 131, 37], device=device)
    sel = read(
        query, keys, num_tape_tokens=max(3, 12 // topk), topk=topk, read_mask=mask, bank_lens=lens
    )
    assert len(set((sel.indices[0] // 64).flatten().tolist())) > 2


@pytest.mark.absent_if(reason=has_no_tiles)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_ties_across_tiles(small_tiles, device, shared):
    rows = torch.randn(3, 6, device=device)
    keys = rows[torch.randint(0, 3, (90,) if shared else (2, 90), device=device)]
    read(torch.randn(2, 6, device=device), keys, num_tape_tokens=6, topk=7)
    read(torch.randn(2, 6, device=device), keys.fill_(1.0), num_tape_tokens=15, topk=6)


@pytest.mark.backends("triton")
@pytest.mark.skipif(
    not triton_runtime.INTERPRETED, reason="float32 keys take it in the interpreter only"
)
def test_a_query_in_bfloat16_parts(monkeypatch, device):
    """Bfloat16 keys meet the query in three parts, which must lose none of its bits."""
    config = triton_tiled_bank.tiled_bank_config
    split = lambda *a: {**config(*a), "SPLIT": True}  # noqa: E731
    monkeypatch.setattr(triton_tiled_bank, "tiled_bank_config", split)
    rounded = torch.randn(40, 20, device=device).to(torch.bfloat16).to(torch.float32)
    query = torch.randn(5, 20, device=device)
    options = dict(num_tape_tokens=4, topk=3, halt_threshold=INF)
    sel = assert_matches_literal(query, rounded, **options)
    exact = reference.tape_select(query.double(), rounded.double(), **options)
    assert_close(sel.weights, exact.weights, 1e-6)
    keys = torch.tensor([NAN, -INF, 1, INF, 2, -INF, NAN, 0], device=device).view(-1, 1)
    for value in (1.0, -1.0, 1e30, 1.0 + 2.0**-20, INF, NAN):
        read(torch.full((1, 1), value, device=device), keys, topk=8)


def test_zeros_of_either_sign_are_equal(device):
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]], device=device)
    query = torch.ones(1, 1, device=device)
    assert read(query, keys).indices[0, :2].tolist() == [[0, 1], [2, 3]]
    assert read(-query, keys).indices[0, :2].tolist() == [[0, 1], [2, 3]]


def test_infinite_and_nan_scores(device):
    keys = torch.tensor([NAN, -INF, 1, INF, 2, -INF, NAN, 0], device=device).view(-1, 1)
    query = torch.ones(1, 1, device=device)
    sel = read(query, keys, topk=8)
    assert sel.indices[0, 0].tolist() == [3, 4, 2, 7, 1, 5, 0, 6]
    read(-query, keys, topk=8)
    read(query, keys[[0, 1, 2, 4, 7]], topk=1)  # -inf comes before NaN
    read(query, keys[[2, 4, 7]], topk=1)


@pytest.mark.parametrize("poisoned", ["query", "keys"])
def test_all_nan_scores_stay_inside_the_bank(device, poisoned):
    query, keys = torch.randn(3, 4, device=device), torch.randn(3, 9, 4, device=device)
    (query if poisoned == "query" else keys).fill_(NAN)
    mask = torch.zeros(3, 9, dtype=torch.bool, device=device)
    mask[1, :3] = True
    lens = torch.tensor([9, 9, 2], device=device)
    sel = read(query, keys, read_mask=mask, bank_lens=lens)
    # A NaN weight is no score below the threshold: each example stops after one step.
    assert sel.indices[:, 0].tolist() == [[0, 1], [3, 4], [0, 1]]
    assert sel.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("topk", "halt_threshold", "count"),
    [(1, 3.0, 3), (1, 2.5, 3), (1, 1.0, 1), (2, 1.0, 2), (2, 1.25, 3), (4, 0.5, 2), (4, 0.75, 3)],
)
def test_a_score_of_exactly_the_threshold_stops(device, topk, halt_threshold, count):
    """Equal keys weigh exactly 1 / topk each, so the halting score is exact."""
    query, keys = torch.randn(2, 3, device=device), torch.ones(16, 3, device=device)
    sel = read(query, keys, topk=topk, halt_threshold=halt_threshold)
    assert sel.counts.tolist() == [count, count]


@pytest.mark.parametrize("halt_threshold", [0.0, -0.0, -1.0, -INF])
def test_nothing_is_read_without_a_threshold_to_reach(device, halt_threshold):
    query, keys = torch.randn(2, 3, device=device), torch.randn(5, 3, device=device)
    assert read(query, keys, halt_threshold=halt_threshold).counts.tolist() == [0, 0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize(("batch", "num_tape_tokens"), [(0, 4), (3, 0), (0, 0)])
def test_empty(device, shared, batch, num_tape_tokens):
    query = torch.randn(batch, 4, device=device, requires_grad=True)
    keys = torch.randn(*([] if shared else [batch]), 5, 4, device=device, requires_grad=True)
    sel = tape_select(query, keys, num_tape_tokens=num_tape_tokens, topk=2, halt_threshold=1.0)
    assert sel.indices.shape == sel.weights.shape == (batch, num_tape_tokens, 2)
    assert sel.counts.tolist() == sel.ponder.tolist() == [0] * batch
    (sel.weights.sum() + sel.ponder.sum()).backward()
    assert query.grad.shape == query.shape and not query.grad.any()
    assert keys.grad.shape == keys.shape and not keys.grad.any()


def test_a_bank_of_one_entry(device):
    sel = read(torch.randn(3, 4, device=device), torch.randn(1, 4, device=device), topk=1)
    assert sel.counts.tolist() == [1, 1, 1]


@st.composite
def reads(draw):
    """Small integers in query and keys, so that the first scores tie often and exactly."""
    batch, topk = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    bank_size, key_dim = draw(st.integers(topk, 9)), draw(st.integers(1, 3))
    number = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 3.0, math.inf, math.nan])

    def tensor(*shape):
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(number, min_size=size, max_size=size))).view(shape)

    mask = draw(st.lists(st.booleans(), min_size=batch * bank_size, max_size=batch * bank_size))
    lens = draw(st.lists(st.integers(0, bank_size), min_size=batch, max_size=batch))
    return dict(
        query=tensor(batch, key_dim),
        keys=tensor(batch, bank_size, key_dim),
        read_mask=torch.tensor(mask, dtype=torch.bool).view(batch, bank_size),
        bank_lens=torch.tensor(lens, dtype=torch.int32),
        topk=topk,
        halt_threshold=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf])),
    )


@given(case=reads())
def test_one_step_with_any_ties_matches_the_literal_loop(device, case):
    """One step: after it, a merged query may tie in exact arithmetic and differ by rounding."""
    case = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.items()}
    assert_matches_literal(**case, num_tape_tokens=1)
