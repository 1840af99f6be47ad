"""Buffers of more than 2³¹ elements: an example at their end has the bits that it has alone."""

import pytest
import torch
from checks import assert_same_bits

from adatape_kernels.ops import elastic_attention, tape_gather, tape_select

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GB free"),
]


@pytest.fixture(autouse=True)
def memory():
    """Not filled with NaN, which would take longer than the kernels."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.empty_cache()


def test_reading():
    batch, bank_size, dim, key_dim = 3, 1_000_000, 768, 64
    assert batch * bank_size * dim > 2**31
    bank = torch.randn(batch, bank_size, dim, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(batch, key_dim, device="cuda", dtype=torch.bfloat16)
    results = []
    for own in (slice(None), slice(2, 3)):
        leaves = [x[own].detach().requires_grad_() for x in (query, bank)]
        selection = tape_select(
            leaves[0], leaves[1][..., :key_dim], num_tape_tokens=3, topk=4, halt_threshold=9.0
        )
        tape, _ = tape_gather(leaves[1], selection.indices, selection.weights, selection.counts)
        tape = tape[-3:]
        _, dbank = torch.autograd.grad(tape.float().square().sum(), leaves)
        read = selection.indices[-1].flatten().long()
        results.append([selection.indices[-1], selection.weights[-1], tape, dbank[-1][read]])
        del dbank, leaves, tape, selection
    for together, alone in zip(*results, strict=True):
        assert_same_bits(together, alone)


def test_attention():
    rows, num_heads, head_dim, last = 1_100_000, 16, 128, 300
    assert rows * num_heads * head_dim > 2**31
    q = torch.randn(rows, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    lens = [*[275] * ((rows - last) // 275), (rows - last) % 275, last]
    results = []
    for given, own_lens in ((q, lens), (q[-last:].clone(), [last])):
        leaf = given.detach().requires_grad_()
        ends = torch.tensor([0, *own_lens], device="cuda").cumsum(0).to(torch.int32)
        out = elastic_attention(
            leaf, leaf, leaf, ends, torch.full_like(ends, int(ends[-1])), max_rows=last
        )
        (grad,) = torch.autograd.grad(out[-last:].float().square().sum(), leaf)
        results.append([out[-last:].detach().clone(), grad[-last:].clone()])
        del out, grad, leaf
    for together, alone in zip(*results, strict=True):
        assert_same_bits(together, alone)
