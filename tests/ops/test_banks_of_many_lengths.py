"""Banks of images of many sizes lie in one padded buffer, which no bit of a result may show."""

import pytest
import torch
from checks import assert_same_bits, interpreted

from adatape_kernels.ops import tape_read

OP = ("tape_select", "tape_gather")


def read(query, bank, bank_lens, cotangent):
    """The results of a read, and the gradients of query and bank."""
    query, bank = (x.detach().requires_grad_() for x in (query, bank))
    options = dict(num_tape_tokens=2, topk=3, halt_threshold=1.7)
    tape, offsets, selection = tape_read(query, bank, bank_lens=bank_lens, **options)
    objective = (tape * cotangent[: len(tape)]).sum() + (selection.weights.sum(2) ** 2).sum()
    (objective + selection.ponder.sum()).backward()
    return tape, offsets, selection, query.grad, bank.grad


def too_large(device, backend, longest):
    return "it takes long" if interpreted(device, backend) and longest > 300 else None


@pytest.mark.many_emulated_threads
@pytest.mark.absent_if(reason=too_large)
@pytest.mark.parametrize("longest", [40, 300, 9_000])
def test_an_example_reads_the_same_bits_alone_and_from_a_padded_bank(device, longest):
    lens = torch.tensor([longest, 3, 2, longest // 3 + 1], device=device)
    query = torch.randn(len(lens), 16, device=device)
    bank = torch.randn(len(lens), longest, 24, device=device)
    bank[torch.arange(longest, device=device) >= lens.unsqueeze(1)] = torch.nan
    cotangent = torch.randn(24, device=device).expand(24, 24)
    tape, offsets, selection, dquery, dbank = read(query, bank, lens, cotangent)
    for i, own in enumerate(lens.tolist()):
        if own < 3:  # fewer than topk: nothing is read, and alone the op takes no such bank
            assert selection.counts[i] == 0 and not dbank[i].any()
            continue
        alone = read(query[i : i + 1], bank[i : i + 1, :own], None, cotangent)
        one_tape, _, one, one_dquery, one_dbank = alone
        assert_same_bits(one_tape, tape[offsets[i] : offsets[i + 1]])
        for a, b in zip(one, selection, strict=True):
            assert_same_bits(a[0], b[i])
        assert_same_bits(one_dquery[0], dquery[i])
        assert_same_bits(one_dbank[0], dbank[i, :own])
        assert not dbank[i, own:].any()
