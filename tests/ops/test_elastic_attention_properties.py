"""What `elastic_attention` promises beyond its values: bits, poison, and torch's own checks."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    INPUT_LENS,
    TAPE_LENS,
    by_reference,
    gradients,
    layout,
    not_served,
    qkv,
)
from checks import assert_same_bits, interpreted, opcheck
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels import reference
from adatape_kernels.ops import elastic_attention

OP = "elastic_attention"
pytestmark = pytest.mark.absent_if(reason=not_served)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 33), (6, 64)])
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, dtype, shape):
    """Alone, in the batch and in the permuted batch, output and gradients."""
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


def test_poison_stays_with_its_example(device):
    assert_poison_stays_with_its_example(elastic_attention, device)


@pytest.mark.no_backend
def test_poison_stays_with_its_example_in_the_reference_too(device):
    assert_poison_stays_with_its_example(by_reference, device)


def assert_poison_stays_with_its_example(attention, device):
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


@pytest.mark.compiles
@pytest.mark.parametrize("max_rows", [None, 9])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [0, 5])
def test_opcheck(device, batch, requires_grad, max_rows):
    cu_inputs, cu_tapes, rows = layout(device, INPUT_LENS[:batch], TAPE_LENS[:batch])
    q, k, v, _ = qkv(sum(map(len, rows)) + 1, 2, 4, device=device)
    q, k, v = (x.requires_grad_(requires_grad) for x in (q, k, v))
    args = (q, k, v, cu_inputs, cu_tapes, max_rows, None)
    opcheck(torch.ops.adatape.elastic_attention.default, args)


@pytest.mark.compiles
def test_opcheck_of_the_backward(device):
    cu_inputs, cu_tapes, _ = layout(device)
    q, k, v, dout = qkv(15, 2, 4, device=device)
    out, lse = reference.elastic_attention(q, k, v, cu_inputs, cu_tapes)
    args = (dout, q, k, v, out, lse, cu_inputs, cu_tapes, None, 0.5)
    opcheck(torch.ops.adatape.elastic_attention_bwd.default, args)


@pytest.mark.compiles
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
