"""What stands on the host for the instructions that csrc/cuda/ptx.cuh issues.

The ops `adatape_ptx`, which call them one by one, exist in the library of tests/cuda_host alone.
"""

import pytest
import torch
from checks import assert_same_bits

OP, DTYPE = "elastic_attention", torch.float16  # the op that uses them
pytestmark = [
    pytest.mark.backends("cuda"),
    pytest.mark.runs_no_op,
    pytest.mark.absent_if(
        reason=lambda device, **_: (
            "only the host's library has ops of single instructions" if device == "cuda" else None
        )
    ),
]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("transpose", [False, True])
def test_matrices_lie_in_registers_as_documented(device, transpose):
    """PTX ISA, ldmatrix: a thread gets two neighbours in row lane / 4, by columns if transposed."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16, device=device).view(4, 8, 8)
    registers = torch.ops.adatape_ptx.load_matrices(matrices, transpose, True)
    pairs = registers.view(torch.int16).view(32, 4, 2).tolist()
    for lane in range(32):
        for m in range(4):
            row, columns = lane // 4, (lane % 4 * 2, lane % 4 * 2 + 1)
            expected = [64 * m + (8 * c + row if transpose else 8 * row + c) for c in columns]
            assert pairs[lane][m] == expected


def test_copies_arrive_no_earlier_than_they_are_waited_for(device):
    matrices = torch.zeros(4, 8, 8, dtype=torch.int16, device=device)
    assert torch.ops.adatape_ptx.load_matrices(matrices, False, False).ne(0).all()


def fragment(matrix, places):
    """The registers of all lanes, as int32: elements at `places(group, thread, i)`, two in each."""
    elements = [
        [matrix[places(lane // 4, lane % 4, i)] for i in range(places.count)] for lane in range(32)
    ]
    return torch.stack([torch.stack(row) for row in elements]).view(torch.int32)


def place_in_a(group, thread, i):
    """PTX ISA, mma.m16n8k16 of 16-bit floats: the row and column of element a_i."""
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(group, thread, i):
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_sum(group, thread, i):
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


place_in_a.count, place_in_b.count, place_in_sum.count = 8, 4, 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_is_a_product_of_matrices_in_fragments(device, dtype):
    """Of small whole numbers, so to the bit."""
    a, b, c = (torch.randint(-9, 9, shape).to(dtype) for shape in ((16, 16), (16, 8), (16, 8)))
    registers = fragment(c.float(), place_in_sum).view(torch.float32).to(device)
    operands = (fragment(a, place_in_a).to(device), fragment(b, place_in_b).to(device))
    torch.ops.adatape_ptx.mma(registers, *operands, dtype == torch.bfloat16)
    expected = fragment(a.float() @ b.float() + c.float(), place_in_sum).view(torch.float32)
    assert_same_bits(registers.cpu(), expected)
