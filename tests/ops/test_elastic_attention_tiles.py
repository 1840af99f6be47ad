"""Examples of one tile and of many, at every tail, in `elastic_attention`; who finds the tiles."""

import pytest
import torch
from attention_cases import by_reference, gradients, layout, not_served, qkv
from checks import assert_close, assert_same_bits, interpreted

from adatape_kernels.ops import elastic_attention, triton_runtime
from adatape_kernels.ops.elastic_attention.triton_primitives import find_tile, num_tiles, tile_rows
from adatape_kernels.ops.triton_runtime import tl, triton

OP = "elastic_attention"
pytestmark = pytest.mark.absent_if(reason=not_served)

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


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 3, 33, 63, 257])
def test_odd_heads_and_odd_rows(device, head_dim, dtype):
    """Where numbers are multiplied in pairs, the last one of a row, or of a column, has none."""
    cu_inputs, cu_tapes, rows = layout(device, [31, 32, 30, 47, 280], [0, 0, 3, 2, 21])
    used = sum(map(len, rows))
    given = qkv(used + 3, 1, head_dim, device=device, dtype=dtype)
    for x in given:
        x.data[used:] = float("nan")
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a[:used], e[:used], 1e-2)
        assert not a[used:].any()


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


def _blocks_of_the_cpu(device, backend, inputs, **parameters):
    if inputs > 1000 and interpreted(device, backend):
        return "the blocks are those of the CPU; 257 keys are many for what is interpreted"
    return None


@pytest.mark.absent_if(reason=_blocks_of_the_cpu)
@pytest.mark.parametrize(("inputs", "tapes"), [(250, 7), (0, 257), (1020, 0), (1020, 9)])
def test_many_keys_of_whole_vectors(device, inputs, tapes):
    """On both sides of what the CPU's kernels take in place and of their blocks of 1024 keys."""
    cu_inputs, cu_tapes, _ = layout(device, [3, inputs], [1, tapes])
    used = 4 + inputs + tapes
    given = qkv(used + 2, 1, 16, device=device)
    for x in given:
        x.data[used:] = float("nan")
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a[:used], e[:used], 1e-5)
        assert not a[used:].any()


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
    triton_runtime.launch(
        _find_tiles_kernel,
        (len(out),),
        cu_inputs_ptr=cu_inputs,
        cu_tapes_ptr=cu_tapes,
        out_ptr=out,
        rows=rows,
        batch=batch,
        BLOCK=block,
        WIDTH=width,
    )
    return out.cpu()


@pytest.mark.backends("triton")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("batch", [0, 1, 4, 5, 70])
@pytest.mark.parametrize("unused", [0, 21])
def test_every_row_is_in_one_tile(device, batch, unused):
    """For batches that take one to four rounds of the search."""
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


@pytest.mark.backends("triton")
@pytest.mark.runs_no_op
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
def test_corrupt_offsets_stay_inside(device, cu_inputs, cu_tapes):
    """Nobody can check offsets on a GPU without a copy; at worst the result is meaningless."""
    cu_inputs, cu_tapes = (torch.tensor(x, dtype=torch.int32) for x in (cu_inputs, cu_tapes))
    found = find_tiles(cu_inputs.to(device), cu_tapes.to(device), 50, block=8, width=4)
    assert found[:, :-1].min() >= -1 and found[:, :-1].max() < 50
    assert found[:, -1].min() >= 0 and found[:, -1].max() <= 2
