"""What the layout of a batch refuses: adatape_kernels/elastic.py and offsets.py."""

import pytest
import torch
from checks import refused
from layout_cases import DIM, make, offsets

from adatape_kernels import ElasticBatch

OP = None  # no backend: every test runs once a device

ROWS, FOUR = torch.zeros(6, DIM), torch.zeros(2, 4, DIM)
NESTED = torch.nested.nested_tensor([torch.zeros(1, 4), torch.zeros(3, 4)], layout=torch.jagged)
CU, NONE, META = offsets([2, 4]), offsets([0, 0], start=6), torch.device("meta")


def test_pooling_refuses(device):
    batch, _ = make([2, 0, 1], [1, 2, 0], device)
    with refused("kind", "token, mean, max or sum", "'median'"):
        batch.pool("median")
    with refused("kind", "an input row in every example", "got 0"):
        batch.pool("token")
    empty, _ = make([], [], device)
    assert empty.pool("token").shape == (0, DIM)


@pytest.mark.parametrize(
    ("argument", "args", "parts"),
    [
        ("data", (torch.zeros(6), CU, NONE), ["(rows, dim)", "(6,)"]),
        ("cu_inputs", (ROWS, CU.short(), NONE), ["int32 or int64", "int16"]),
        ("cu_inputs", (ROWS, CU[None], NONE), ["(batch + 1,)", "(1, 3)"]),
        ("cu_inputs", (ROWS, CU[:0], NONE), ["(batch + 1,)", "(0,)"]),
        ("cu_inputs", (ROWS, CU.to(META), NONE), ["cpu", "meta"]),
        ("cu_inputs", (ROWS, CU + 1, NONE), ["first offset", "got 1"]),
        ("cu_inputs", (ROWS, offsets([7, -1]), NONE), ["ascending", "7 then 6 at 1, 2"]),
        ("cu_inputs", (ROWS, offsets([2, 5]), NONE + 1), ["last offset", "6", "got 7"]),
        ("cu_tapes", (ROWS, CU, NONE.short()), ["int32 or int64", "int16"]),
        ("cu_tapes", (ROWS, CU, NONE[:2]), ["(3,)", "(2,)"]),
        ("cu_tapes", (ROWS, CU, NONE.to(META)), ["cpu", "meta"]),
        ("cu_tapes", (ROWS, CU, NONE - 1), ["first offset", "6", "got 5"]),
        ("cu_tapes", (ROWS, offsets([2, 2]), offsets([1, -1], start=4)), ["5 then 4"]),
        ("cu_tapes", (ROWS, offsets([2, 2]), offsets([1, 0], start=4)), ["be 6", "got 5"]),
        ("cu_tapes", (ROWS, CU, offsets([0, 1], start=6)), ["be 6", "got 7"]),
    ],
)
def test_from_offsets_refuses(argument, args, parts):
    with refused(argument, *parts):
        ElasticBatch.from_offsets(*args)


def test_from_offsets_refuses_too_many_rows_in_capacity_mode():
    with refused("cu_tapes", "at most 6", "got 7"):
        ElasticBatch.from_offsets(ROWS, CU, offsets([0, 1], start=6), exact=False)


@pytest.mark.parametrize(
    ("argument", "args", "parts"),
    [
        ("padded", (ROWS,), ["(batch, seqlen, dim)", "(6, 3)"]),
        ("mask", (FOUR, torch.zeros(2, 3).bool()), ["(2, 4)", "(2, 3)"]),
        ("mask", (FOUR, torch.zeros(2, 4)), ["bool", "float32"]),
        ("mask", (FOUR, torch.zeros(2, 4, device=META).bool()), ["cpu", "meta"]),
        ("tape_lens", (FOUR, None, torch.tensor([1.0, 2.0])), ["int32 or int64", "float32"]),
        ("tape_lens", (FOUR, None, torch.tensor([True, False])), ["int32 or int64", "bool"]),
        ("tape_lens", (FOUR, None, torch.tensor([1])), ["(2,)", "(1,)"]),
        ("tape_lens", (FOUR, None, torch.tensor([1, -1])), ["0 to 4", "example 1", "got -1"]),
        ("tape_lens", (FOUR, None, torch.tensor([5, 1])), ["0 to 4", "example 0", "got 5"]),
        ("tape_lens", (FOUR, None, torch.tensor([1, 1], device=META)), ["cpu", "meta"]),
    ],
)
def test_from_padded_refuses(argument, args, parts):
    with refused(argument, *parts):
        ElasticBatch.from_padded(*args)


@pytest.mark.parametrize(
    ("argument", "args", "parts"),
    [
        ("packed", (FOUR, CU), ["(rows, dim)", "(2, 4, 3)"]),
        ("cu_seqlens", (ROWS, CU.short()), ["int32 or int64", "int16"]),
        ("cu_seqlens", (ROWS, CU.to(META)), ["cpu", "meta"]),
        ("cu_seqlens", (ROWS, CU + 1), ["first offset", "got 1"]),
        ("cu_seqlens", (ROWS, offsets([8, -2])), ["ascending", "8 then 6"]),
        ("cu_seqlens", (ROWS, offsets([2, 3])), ["last offset", "6", "got 5"]),
        ("tape_lens", (ROWS, CU, torch.tensor([3, 0])), ["0 to 2", "example 0", "got 3"]),
    ],
)
def test_from_packed_refuses(argument, args, parts):
    with refused(argument, *parts):
        ElasticBatch.from_packed(*args)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "nested",
    [
        lambda: FOUR,
        lambda: torch.nested.nested_tensor([torch.zeros(1, 4), torch.zeros(3, 4)]),
        lambda: NESTED.transpose(1, 2),  # with as many rows as features, nothing else shows it
        lambda: NESTED.unsqueeze(-1),
        lambda: torch.nested.narrow(
            FOUR, 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
        ),
    ],
    ids=["plain", "strided layout", "transposed", "four dimensions", "holes"],
)
def test_from_nested_refuses(nested):
    with refused("nested", "contiguous nested tensor", "torch.jagged"):
        ElasticBatch.from_nested(nested())
