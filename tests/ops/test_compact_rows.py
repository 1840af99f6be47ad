"""What `compact_rows` keeps, what it refuses, and what it promises beyond its values."""

import contextlib
import math

import literal
import pytest
import torch
from checks import assert_same_bits, has_one_thread, opcheck
from row_cases import batch_of, gradients

from adatape_kernels import reference
from adatape_kernels.ops import compact_rows, triton_runtime
from adatape_kernels.ops.op import current_backend, operation

OP = "compact_rows"
# Rows that are moved by accesses of 4 bytes, of 16, and of 2, and rows of several blocks.
SIZES = pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (1, torch.float32),
        (8, torch.float32),
        (300, torch.float32),
        (9, torch.float16),
        (8, torch.bfloat16),
        (9, torch.bfloat16),
        (9, torch.float64),
    ],
)


def assert_matches_literal(given, capacity=None):
    data, keep, cu_inputs, cu_tapes = given
    packed, kept_inputs, kept_tapes, source = compact_rows(*given, capacity=capacity)
    rows, *ends, came_from = literal.compact_rows(
        list(data.unbind(0)), keep.tolist(), cu_inputs.tolist(), cu_tapes.tolist()
    )
    unused = 0 if capacity is None else capacity - len(rows)
    zeros = data.new_zeros(unused, data.shape[1])
    assert_same_bits(packed, torch.cat([*(row[None] for row in rows), zeros]))
    assert [kept_inputs.tolist(), kept_tapes.tolist()] == ends
    assert source.tolist() == came_from + [-1] * unused
    assert {x.dtype for x in (kept_inputs, kept_tapes, source)} == {torch.int32}
    assert packed.is_contiguous() and source.is_contiguous()


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("capacity", [None, 31])
@SIZES
def test_matches_the_literal_loop(device, dim, capacity, dtype):
    assert_matches_literal(batch_of(device, dim=dim, dtype=dtype), capacity)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_long_runs_and_lonely_rows_match_the_literal_loop(device, share):
    """More rows than a program numbers at a time, or a task copies."""
    lens = dict(input_lens=(700, 0, 197, 130), tape_lens=(61, 64, 1, 0))
    assert_matches_literal(batch_of(device, share=share, dim=4, **lens))


def test_more_chunks_than_one_count_before_themselves(device):
    """A program counts 4,096 rows at a time and there are several programs before it."""
    given = batch_of(device, input_lens=(4100, 1000), tape_lens=(7, 900), dim=1)
    packed, _, kept_tapes, source = compact_rows(*given)
    expected = given[1][:-3].nonzero().squeeze(1)
    assert torch.equal(source.long(), expected) and int(kept_tapes[-1]) == len(expected)
    assert_same_bits(packed, given[0][expected])


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("capacity", [None, 28])
def test_gradcheck(device, dtype, capacity):
    data, *rest = batch_of(device, dtype=dtype, dim=3)
    data = data.nan_to_num(0.5).requires_grad_()
    kept = lambda data: compact_rows(data, *rest, capacity=capacity)[0]  # noqa: E731
    assert torch.autograd.gradcheck(kept, (data,))
    assert torch.autograd.gradgradcheck(kept, (data,))


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("capacity", [None, 31])
@SIZES
def test_the_gradient_returns_and_is_zero_where_a_row_left(device, dim, capacity, dtype):
    given = batch_of(device, dim=dim, dtype=dtype)
    source = compact_rows(*given, capacity=capacity)[3].long()
    dpacked = torch.randn(len(source), dim, device=device).to(dtype)
    dpacked[source < 0] = math.nan
    _, ddata = gradients(compact_rows, given, dpacked, capacity=capacity)
    expected = torch.zeros_like(given[0])
    expected[source[source >= 0]] = dpacked[source >= 0]
    assert_same_bits(ddata, expected)


def test_strided_data_and_gradients(device):
    data, keep, *offsets = batch_of(device)
    dpacked = torch.randn(9, len(keep), device=device).mT
    strided = [data.mT.contiguous().mT, keep.repeat_interleave(2)[::2], *offsets]
    wide = [torch.cat([data, data], 1)[:, :9], keep, *offsets]
    expected = gradients(compact_rows, (data, keep, *offsets), dpacked.contiguous(), capacity=31)
    for given in (strided, wide):
        for a, e in zip(
            gradients(compact_rows, given, dpacked, capacity=31), expected, strict=True
        ):
            assert_same_bits(a, e)


def test_an_example_s_rows_do_not_depend_on_its_batch(device):
    data, keep, cu_inputs, cu_tapes = batch_of(device)
    packed, kept_inputs, kept_tapes, _ = compact_rows(data, keep, cu_inputs, cu_tapes)
    for i in range(4):
        parts = [slice(*offsets[i : i + 2].tolist()) for offsets in (cu_inputs, cu_tapes)]
        alone = torch.tensor([0, parts[0].stop - parts[0].start], device=device, dtype=torch.int32)
        tapes = alone[1] + torch.tensor([0, parts[1].stop - parts[1].start], device=device)
        own = [torch.cat([x[part] for part in parts]) for x in (data, keep)]
        mine = compact_rows(*own, alone, tapes)[0]
        places = [slice(*offsets[i : i + 2].tolist()) for offsets in (kept_inputs, kept_tapes)]
        assert_same_bits(mine, torch.cat([packed[place] for place in places]))


@pytest.mark.several_threads
@pytest.mark.absent_if(reason=has_one_thread)
def test_bits_do_not_depend_on_the_number_of_threads(device):
    given = batch_of(device, input_lens=(900, 300), tape_lens=(200, 0), dim=33)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        packed = compact_rows(*given)[0]
        results.append([packed, *gradients(compact_rows, given, torch.ones_like(packed))])
    torch.set_num_threads(1)
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("capacity", [None, 0, 4])
@pytest.mark.parametrize(
    ("lens", "dim", "share"),
    [((), 5, 1.0), ((0, 0), 5, 1.0), ((3, 4), 0, 0.0), ((3, 4), 5, 0.0)],
    ids=["batch", "rows", "dim", "kept"],
)
def test_empty(device, lens, dim, share, capacity):
    given = batch_of(device, input_lens=lens, tape_lens=lens, unused=0, dim=dim, share=share)
    given = [given[0].requires_grad_(), *given[1:]]
    packed, kept_inputs, kept_tapes, source = compact_rows(*given, capacity=capacity)
    assert packed.shape == (capacity or 0, dim) and not packed.any()
    assert kept_inputs.tolist() == kept_tapes.tolist() == [0] * (len(lens) + 1)
    assert source.tolist() == [-1] * (capacity or 0)
    packed.sum().backward()
    assert given[0].grad.shape == given[0].shape and not given[0].grad.any()


@pytest.mark.backends("triton", "cuda")
@pytest.mark.runs_no_op
def test_where_no_value_is_looked_at_none_does_harm(device):
    """Below the dispatcher: offsets move into the rows; rows beyond the capacity are dropped."""
    forward, backward = (
        operation(op).implementations[current_backend()].function for op in (OP, f"{OP}_bwd")
    )
    data, keep, cu_inputs, cu_tapes = batch_of(device, share=1.0)
    data = data.nan_to_num(0.5)
    packed, kept_inputs, kept_tapes, source = forward(data, keep, cu_inputs, cu_tapes, 6)
    assert_same_bits(packed, data[:6])
    assert source.tolist() == list(range(6)) and int(kept_tapes[-1]) == 28
    assert torch.equal(kept_inputs, cu_inputs)
    corrupt = torch.tensor([-5, 3, 2**31 - 1], dtype=torch.int32, device=device)
    packed, kept_inputs, _, source = forward(data, keep, corrupt, corrupt, 40)
    assert kept_inputs.tolist() == [0, 3, len(data)]
    assert_same_bits(packed[: len(data)], data)
    corrupt = torch.tensor([3, 3, -7, 2**31 - 1], dtype=torch.int32, device=device)
    assert backward(packed[:4], corrupt, 9).shape == (9, 9)


def test_a_capacity_copies_nothing_to_the_host():
    """Tensors without data have nothing to copy."""
    with triton_runtime.recording() as launches, torch.device("meta"):
        forward, backward = (
            operation(op).implementations["triton"].function for op in (OP, f"{OP}_bwd")
        )
        offsets = torch.empty(4, dtype=torch.int32)
        keep = torch.empty(60, dtype=torch.bool)
        packed, _, _, source = forward(torch.empty(60, 16), keep, offsets, offsets, 50)
        backward(packed, source, 60)
    assert len(launches) == 3


@pytest.mark.compiles
@pytest.mark.parametrize("lens", [(), (3, 2)])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("capacity", [None, 13])
def test_opcheck(device, capacity, requires_grad, lens):
    data, *rest = batch_of(device, input_lens=lens, tape_lens=lens)
    data = data.nan_to_num(0).requires_grad_(requires_grad)
    opcheck(torch.ops.adatape.compact_rows.default, (data, *rest, capacity))


@pytest.mark.compiles
def test_opcheck_of_the_backward(device):
    source = torch.tensor([1, 3, -1], dtype=torch.int32, device=device)
    args = (torch.randn(3, 4, device=device), source, 5)
    opcheck(torch.ops.adatape.compact_rows_bwd.default, args)


@pytest.mark.compiles
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
def test_compiles_once_for_all_sizes(fresh_compiler, device, exact):
    compiled = torch.compile(compact_rows, fullgraph=True, dynamic=True)
    switch = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with switch if exact else contextlib.nullcontext():
        for n, lens in enumerate([(2, 5, 0, 1), (4, 1), (1, 0, 2)]):
            given = batch_of(device, input_lens=lens, tape_lens=lens, dim=4 + n)
            capacity = None if exact else 40 + n
            expected = compact_rows(*given, capacity=capacity)
            dpacked = torch.randn_like(expected[0])
            with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
                actual = gradients(compiled, given, dpacked, capacity=capacity)
            for a, e in zip(
                actual, gradients(compact_rows, given, dpacked, capacity=capacity), strict=True
            ):
                assert_same_bits(a, e)


@pytest.mark.no_backend
def test_poison_in_the_reference_stays_out_too(device):
    given = batch_of(device)
    packed, *_, source = reference.compact_rows(*given)
    assert packed.isfinite().all()
    dpacked = torch.ones_like(packed)
    assert reference.compact_rows_bwd(dpacked, source, len(given[0])).sum() == packed.numel()


def test_vmap_takes_a_capacity(device):
    given = [batch_of(device) for _ in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*given, strict=True)]
    packed, *_, source = torch.vmap(lambda *a: compact_rows(*a, capacity=31))(*stacked)
    for i, args in enumerate(given):
        expected = compact_rows(*args, capacity=31)
        assert_same_bits(packed[i], expected[0])
        assert_same_bits(source[i], expected[3])
