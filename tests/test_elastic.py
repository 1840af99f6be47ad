import math

import pytest
import torch
from checks import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from layout_cases import DIM, make, numbered, offsets

from adatape_kernels import ElasticBatch

OP = None  # no backend: every test runs once a device


def assert_owns(batch, examples):
    """Every way of taking the batch apart gives these rows (lists of lists)."""
    assert batch.batch == len(examples)
    assert batch.lens.tolist() == [len(rows) for rows in examples]
    assert batch.max_rows >= max(map(len, examples), default=0)

    packed, cu_seqlens = batch.to_packed()
    assert packed.tolist() == [row for rows in examples for row in rows]
    assert cu_seqlens.dtype == torch.int32
    assert_same_bits(cu_seqlens, offsets([len(r) for r in examples], cu_seqlens.device))

    padded, mask = batch.to_padded()
    longest = max(map(len, examples), default=0)
    assert padded.shape == (len(examples), longest, DIM) and mask.shape == padded.shape[:2]
    for i, rows in enumerate(examples):
        assert padded[i].tolist() == rows + [[0.0] * DIM] * (longest - len(rows))
        assert mask[i].tolist() == [True] * len(rows) + [False] * (longest - len(rows))

    owners = batch.example_of_rows()
    assert owners.shape == batch.data.shape[:1]
    for i, rows in enumerate(examples):
        assert batch.data[owners == i].tolist() == rows
    assert int((owners == len(examples)).sum()) == len(batch.data) - sum(map(len, examples))


lengths = st.lists(st.integers(0, 4), max_size=5)


@st.composite
def two_lengths(draw, unused=3):
    input_lens = draw(lengths)
    size = len(input_lens)
    tape_lens = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    return input_lens, tape_lens, draw(st.integers(0, unused))


@given(case=two_lengths())
def test_any_layout_is_taken_apart_exactly(device, case):
    input_lens, tape_lens, unused = case
    batch, examples = make(input_lens, tape_lens, device, unused)
    assert_owns(batch, examples)
    assert batch.input_lens.tolist() == input_lens and batch.tape_lens.tolist() == tape_lens
    assert batch.num_input_rows == sum(input_lens)
    assert batch.min_inputs == min(input_lens, default=0)
    assert batch.max_inputs == max(input_lens, default=0)
    assert batch.max_tapes == max(tape_lens, default=0)
    used = sum(input_lens) + sum(tape_lens)
    assert batch.num_used_rows is None if batch.exact else batch.num_used_rows == used


@st.composite
def masks(draw):
    batch, seqlen = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    size = batch * seqlen
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask = mask.bool().view(batch, seqlen)
    tapes = [draw(st.integers(0, int(n))) for n in mask.sum(1)]
    return mask, draw(st.sampled_from([None, tapes]))


def integers(lens, device):
    return None if lens is None else torch.tensor(lens, dtype=torch.int64, device=device)


@given(case=masks())
def test_padded_with_any_mask_round_trips(device, case):
    mask, tapes = case
    padded = numbered(mask.numel(), device).view(*mask.shape, DIM)
    examples = [padded[i][mask[i]].tolist() for i in range(len(mask))]
    padded = padded.where(mask.to(device)[..., None], math.nan)
    batch = ElasticBatch.from_padded(padded, mask.to(device), integers(tapes, device))
    assert_owns(batch, examples)
    assert batch.tape_lens.tolist() == (tapes or [0] * len(mask))
    again = ElasticBatch.from_padded(*batch.to_padded(), batch.tape_lens)
    assert_same_bits(again.data, batch.data)


@given(case=two_lengths())
def test_packed_round_trips(device, case):
    input_lens, tape_lens, _ = case
    lens = [a + b for a, b in zip(input_lens, tape_lens, strict=True)]
    packed, cu_seqlens = numbered(sum(lens), device), offsets(lens, device)
    for tapes in (None, tape_lens):
        batch = ElasticBatch.from_packed(packed, cu_seqlens, integers(tapes, device))
        assert batch.tape_lens.tolist() == (tapes or [0] * len(lens))
        for a, e in zip(batch.to_packed(), (packed, cu_seqlens), strict=True):
            assert_same_bits(a, e)
        assert_owns(batch, [rows.tolist() for rows in packed.split(lens)] if lens else [])


@given(case=two_lengths())
def test_nested_round_trips(device, case):
    input_lens, tape_lens, _ = case
    lens = [a + b for a, b in zip(input_lens, tape_lens, strict=True)]
    nested = torch.nested.nested_tensor_from_jagged(
        numbered(sum(lens), device), offsets(lens, device).long()
    )
    for tapes in (None, tape_lens):
        batch = ElasticBatch.from_nested(nested, integers(tapes, device))
        back = batch.to_nested()
        assert back.layout == torch.jagged
        assert_same_bits(back.values(), nested.values())
        assert_same_bits(back.offsets(), nested.offsets())
        assert_owns(batch, [rows.tolist() for rows in nested.values().split(lens)] if lens else [])


@st.composite
def appends(draw):
    """Input lengths, unused rows, and appends: tape lengths, and unused rows of a capacity."""
    input_lens = draw(lengths)
    size = len(input_lens)
    lens = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    unused = st.one_of(st.none(), st.integers(0, 3))
    reads = draw(st.lists(st.tuples(lens, unused), min_size=1, max_size=3))
    return input_lens, draw(st.integers(0, 2)), reads


@given(case=appends())
def test_appends_are_those_of_a_list_of_lists(device, case):
    """Exact and capacity mode in any sequence; unused rows hold NaN."""
    input_lens, unused_before, reads = case
    batch, examples = make(input_lens, [0] * len(input_lens), device, unused_before)
    inputs, number, exact = batch.data[: sum(input_lens)].clone(), 1000.0, unused_before == 0
    for tape_lens, unused in reads:
        total = sum(tape_lens)
        tape = numbered(total, device) + number
        number += 1000
        for i, rows in enumerate(tape.split(tape_lens) if tape_lens else []):
            examples[i] = examples[i] + rows.tolist()
        padded = torch.nn.functional.pad(tape, (0, 0, 0, unused or 0), value=math.nan)
        batch = batch.append_tape(
            padded, offsets(tape_lens, device), max_tapes=3, exact=unused is None
        )
        exact = exact and unused is None
        assert batch.exact == exact
        assert_owns(batch, examples)
        assert_same_bits(batch.data[: len(inputs)], inputs)
        used = int(batch.lens.sum())
        assert batch.data[used:].isnan().all() and not batch.data[:used].isnan().any()
        assert batch.num_used_rows is None if exact else batch.num_used_rows == used


def test_gradients_go_back_to_the_rows_they_came_from(device):
    padded = torch.randn(3, 4, DIM, device=device, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], device=device).bool()
    tapes = [torch.randn(n, DIM, device=device, requires_grad=True) for n in (4, 3)]
    batch = ElasticBatch.from_padded(padded, mask, torch.tensor([1, 0, 0], device=device))
    batch = batch.append_tape(tapes[0], offsets([1, 2, 0], device), max_tapes=2, exact=False)
    batch = batch.append_tape(tapes[1], offsets([0, 1, 2], device), max_tapes=2)
    packed, _ = batch.to_packed()
    weights = numbered(len(packed), device)
    (packed * weights).sum().backward()
    a, t = weights, [x.grad for x in tapes]
    # example after example: three valid rows, then what each read appended
    assert_same_bits(padded.grad[mask], torch.cat([a[0:3], a[7:9]]))
    assert not padded.grad[~mask].any()
    assert_same_bits(t[0], torch.cat([a[3:6], torch.zeros(1, DIM, device=device)]))
    assert_same_bits(t[1], torch.cat([a[6:7], a[9:11]]))


def test_a_dense_batch_is_its_own_input_segment(device):
    padded = torch.randn(4, 5, DIM, device=device)
    batch = ElasticBatch.from_padded(padded)
    assert batch.data.data_ptr() == padded.data_ptr()
    assert_owns(batch, padded.tolist())
    assert (batch.min_inputs, batch.max_inputs, batch.num_input_rows) == (5, 5, 20)
    # A capacity of tape that nobody has read into yet lies behind the inputs.
    tape = torch.full((2, DIM), math.nan, device=device)
    none = offsets([0] * 4, device)
    assert_owns(batch.append_tape(tape, none, max_tapes=2, exact=False), padded.tolist())


def test_strided_padded_rows(device):
    padded = torch.randn(DIM, 5, 4, device=device).permute(2, 1, 0)
    assert_owns(ElasticBatch.from_padded(padded), padded.tolist())


def test_with_data_keeps_the_layout(device):
    batch, _ = make([2, 0, 1], [1, 2, 0], device, unused=1)
    wider = torch.zeros(7, 2 * DIM, device=device)
    other = batch.with_data(wider)
    assert other.data is wider and other.cu_inputs is batch.cu_inputs
    assert other.cu_tapes is batch.cu_tapes and not other.exact


def pooled(rows, kind):
    if kind == "token":
        return rows[0]
    columns = list(zip(*rows, strict=True))
    if not rows:
        return [0.0] * DIM
    if kind == "mean":
        return [sum(column) / len(rows) for column in columns]
    return [max(column) if kind == "max" else sum(column) for column in columns]


@given(case=two_lengths(), sign=st.sampled_from([1.0, -1.0]))
def test_pooling_is_over_the_rows_of_the_example(device, case, sign):
    """Negative rows too, so that a maximum with padding or a start of zero shows."""
    batch, examples = make(*case[:2], device, case[2])
    batch = batch.with_data((sign * batch.data).requires_grad_())
    examples = [[[sign * x for x in row] for row in rows] for rows in examples]
    for kind in ("mean", "max", "sum", "token"):
        if kind == "token" and batch.min_inputs == 0:
            continue
        out = batch.pool(kind)
        assert out.shape == (len(examples), DIM)
        expected = torch.tensor([pooled(rows, kind) for rows in examples]).view(-1, DIM)
        torch.testing.assert_close(out.detach().cpu(), expected)
        (grad,) = torch.autograd.grad(out.sum(), batch.data)
        for i, n in enumerate(batch.lens.tolist()):
            own = grad[batch.example_of_rows() == i]
            total = {"sum": float(n)}.get(kind, float(n > 0))
            torch.testing.assert_close(own.sum(0), torch.full_like(own.sum(0), total))
        assert not grad[batch.example_of_rows() == len(examples)].any()  # unused rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_adds_up_in_float32(device, dtype):
    """One by one, bfloat16 counts to 256 and float16 to 2048, where a sum soon overflows."""
    data = torch.ones(4096, 1, dtype=dtype, device=device)
    for kind, expected in (("sum", 4096), ("mean", 1)):
        out = ElasticBatch.from_padded(data[None]).pool(kind)
        assert out.dtype == dtype and out.item() == expected
    large = ElasticBatch.from_padded(data[None] * 60_000)
    assert large.pool("mean").item() == (data[0] * 60_000).item()


@pytest.mark.parametrize("kind", ["mean", "max", "sum", "token"])
def test_pooling_does_not_mix_examples(device, kind):
    """NaN in one example and in unused rows stays there; the bits do not depend on the others."""
    batch, _ = make([2, 3, 1], [1, 0, 4], device, unused=2)
    data = torch.randn_like(batch.data)
    clean = batch.with_data(data).pool(kind)
    owners = batch.example_of_rows()
    poisoned = data.where((owners != 1)[:, None] & (owners < 3)[:, None], math.nan)
    poisoned.requires_grad_()
    dirty = batch.with_data(poisoned).pool(kind)
    assert dirty[1].isnan().all()
    for i in (0, 2):
        assert_same_bits(dirty[i], clean[i])
        alone = data[owners == i]
        packed = ElasticBatch.from_packed(alone, offsets([len(alone)], device))
        assert_same_bits(packed.pool(kind)[0], clean[i])
    (grad,) = torch.autograd.grad(dirty[[0, 2]].sum(), poisoned)
    assert grad[owners != 1].isfinite().all() and not grad[owners == 3].any()
