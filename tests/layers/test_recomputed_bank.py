"""A reader makes the entries that it read once more, and its gradient passes these alone."""

import pytest
import torch
from checks import assert_close, assert_same_bits
from reading_paths import all_entries, largest_saved, makes_rows_again, of_any_size
from torch import nn

import adatape_kernels as ak

pytestmark = pytest.mark.usefixtures(of_any_size.__name__)
BATCH, BANK, DIM = 4, 50, 12
OPTIONS = dict(num_tape_tokens=4, topk=3, halt_threshold=1.2, key_split=2)
VARIANTS = {
    "plain": {},
    "whole key, gap": {"key_split": 1, "query": "gap"},
    "max, not averaged": {"loss_type": "max", "average_query": False},
    "reads to the end": {"halt_threshold": 99.0},
    "reads nothing": {"halt_threshold": -1.0},
    "regularised": {"query_noise": 0.3, "bank_dropout": 0.4},
    "projection": {"tape_mlp_dim": 5},
}


def build(dtype=torch.float64, **changes):
    torch.manual_seed(2)
    reader = ak.layers.TapeReader(DIM, **{**OPTIONS, **changes}).to(dtype)
    for parameter in reader.parameters():
        nn.init.normal_(parameter, 0.5)
    return reader


def given(dtype=torch.float64, requires_grad=True, batch=BATCH):
    torch.manual_seed(3)
    data, bank = torch.randn(batch, 5, DIM), torch.randn(batch, BANK, DIM)
    return [x.to(dtype).requires_grad_(requires_grad) for x in (data, bank)]


def read(reader, data, bank, **options):
    torch.manual_seed(4)
    x, selection = reader(ak.ElasticBatch.from_padded(data), bank, **options)
    return x.data, selection


def gradients(reader, data, bank, **options):
    rows, selection = read(reader, data, bank, **options)
    scale = torch.arange(1.0, rows.numel() + 1, dtype=rows.dtype).view(rows.shape) / rows.numel()
    objective = (rows * scale).sum() + selection.ponder.sum() + selection.weights.square().sum()
    wanted = [x for x in (data, bank, *reader.parameters()) if x.requires_grad]
    found = torch.autograd.grad(objective, wanted, allow_unused=True)
    return [rows.detach(), *(x.detach() for x in selection)], found


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("bank_lens", [None, (BANK, 0, 7, 2)], ids=["whole", "ragged"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_all_entries(variant, bank_lens, capacity):
    reader, (data, bank) = build(**VARIANTS[variant]), given()
    lens = None if bank_lens is None else torch.tensor(bank_lens)
    options = dict(bank_lens=lens, capacity=capacity)
    assert makes_rows_again(read, reader, data, bank, **options)
    actual, found = gradients(reader, data, bank, **options)
    with all_entries(reader):
        assert not makes_rows_again(read, reader, data, bank, **options)
        expected, wanted = gradients(reader, data, bank, **options)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    for a, e in zip(found, wanted, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_close(a, e, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_other_dtypes(dtype):
    reader, (data, bank) = build(dtype), given(dtype)
    actual, found = gradients(reader, data, bank)
    with all_entries(reader):
        expected, wanted = gradients(reader, data, bank)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    for a, e in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("frozen", ["bank", "norm", "query"])
def test_what_has_no_gradient_gets_none(frozen):
    reader, (data, bank) = build(), given()
    reader.bank_norm.requires_grad_(frozen != "norm")
    data.requires_grad_(frozen != "query")
    bank.requires_grad_(frozen != "bank")
    _, found = gradients(reader, data, bank)
    with all_entries(reader):
        _, wanted = gradients(reader, data, bank)
    for a, e in zip(found, wanted, strict=True):
        assert_close(a, e, 1e-12)


def test_nothing_is_done_twice_where_nothing_has_a_gradient():
    reader, (data, bank) = build().requires_grad_(False), given(requires_grad=False)
    assert not makes_rows_again(read, reader, data, bank)


def test_unread_entries_may_be_anything():
    """Not even the norm's parameters see them, as they do where all entries have a gradient."""
    reader, (data, bank) = build(halt_threshold=99.0, num_tape_tokens=2), given()
    lens = torch.full((BATCH,), BANK - 3)
    poisoned = bank.detach().clone()
    poisoned[:, -3:] = torch.nan
    poisoned[3] = torch.nan  # the example's query and read are its own
    lens[3] = 0
    expected = gradients(reader, data, bank, bank_lens=lens)
    actual = gradients(reader, data, poisoned.requires_grad_(), bank_lens=lens)
    for part in range(2):
        for a, e in zip(actual[part], expected[part], strict=True):
            assert_same_bits(a, e)


def test_nothing_as_large_as_the_bank_is_kept():
    reader, (data, bank) = build(num_tape_tokens=2), given(torch.float32)
    reader.float()
    with largest_saved() as sizes:
        read(reader, data, bank)
    assert max(sizes) < bank.numel() / 2
    with all_entries(reader), largest_saved() as sizes:
        read(reader, data, bank)
    assert max(sizes) >= bank.numel()


def test_second_derivatives():
    reader, (data, bank) = build(num_tape_tokens=2), given()

    def of_the_gradient(*inputs):
        rows, selection = read(reader, *inputs)
        objective = rows.pow(3).sum() + selection.ponder.square().sum()
        first = torch.autograd.grad(objective, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    actual = of_the_gradient(data, bank)
    with all_entries(reader):
        for a, e in zip(actual, of_the_gradient(data, bank), strict=True):
            assert_close(a, e, 1e-11)


class Changed(ak.layers.TapeReader):
    def normalised(self, bank, query):
        values, query, mask = super().normalised(bank, query)
        return 2 * values, query, mask


UNSUITED = {
    "more than a third is read": lambda r: setattr(r, "num_tape_tokens", 6) or r,
    "nothing is read": lambda r: setattr(r, "num_tape_tokens", 0) or r,
    "another norm": lambda r: setattr(r, "bank_norm", nn.Identity()) or r,
    "a subclass": lambda r: setattr(r, "__class__", Changed) or r,
    "a method of its own": lambda r: setattr(r, "normalised", r.normalised) or r,
}


@pytest.mark.parametrize("why", UNSUITED)
def test_all_entries_have_a_gradient_where(why):
    reader, (data, bank) = UNSUITED[why](build()), given()
    assert not makes_rows_again(read, reader, data, bank)


def test_modes_without_a_backward_pass_make_nothing_twice():
    reader, (data, bank) = build(), given()
    with torch.no_grad():
        assert not makes_rows_again(read, reader, data, bank)
    with torch.autograd.forward_ad.dual_level():
        assert not makes_rows_again(read, reader, data, bank)
    shared, none = bank[0], given(batch=0)
    assert not makes_rows_again(read, reader, data, shared)
    assert not makes_rows_again(read, reader, *none)


def test_small_banks_and_large_ones(monkeypatch):
    monkeypatch.undo()
    reader, (data, bank) = build(torch.float32), given(torch.float32)
    large = torch.zeros(BATCH, 1 + (1 << 23) // (BATCH * DIM), DIM, requires_grad=True)
    assert not makes_rows_again(read, reader, data, bank)
    assert makes_rows_again(read, reader, data, large)


@pytest.mark.skipif(
    not ak.ops.fast_autograd.SINGLE_LEVEL, reason="this torch applies autograd functions in C++"
)
def test_torch_func_and_forward_mode_agree():
    reader, (data, bank) = build(), given()

    def objective(data, bank):
        return read(reader, data, bank)[0].pow(3).sum()

    wanted = torch.autograd.grad(objective(data, bank), (data, bank))
    inputs, moved = (data.detach(), bank.detach()), (torch.randn_like(data), torch.randn_like(bank))
    _, tangent = torch.func.jvp(objective, inputs, moved)
    assert_close(tangent, sum((g * m).sum() for g, m in zip(wanted, moved, strict=True)), 1e-11)
    for a, e in zip(torch.func.grad(objective, (0, 1))(*inputs), wanted, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.compiles
def test_compiled_gradients(fresh_compiler):
    reader, (data, bank), capacity = build(), given(), 20
    compiled = torch.compile(reader, fullgraph=True, backend="aot_eager")
    with largest_saved() as sizes:
        actual, found = gradients(compiled, data, bank, capacity=capacity)
    assert 0 < max(sizes) < bank.numel()
    with all_entries(reader):
        expected, wanted = gradients(reader, data, bank, capacity=capacity)
    for a, e in zip([*actual, *found], [*expected, *wanted], strict=True):
        assert_close(a, e, 1e-12)
