"""bfloat16 in `elastic_attention` at lengths and widths around those of its products' blocks."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import by_reference, gradients, layout, qkv
from checks import assert_close

from adatape_kernels.ops import elastic_attention

OP = "elastic_attention"
DTYPE = {"cpp": torch.bfloat16}
pytestmark = pytest.mark.backends("cpp")


def root_mean_square(x):
    return x.square().mean().sqrt()


def assert_as_exact_as_plain_torch(input_lens, tape_lens, num_heads, head_dim, device):
    """Output and gradients beside torch's own attention in bfloat16, one example at a time.

    An example has few numbers, of which the largest error is a matter of luck: so errors are
    compared by their root mean square, and each is bounded by itself.
    """
    cu_inputs, cu_tapes, rows = layout(device, input_lens, tape_lens)
    used = sum(map(len, rows))
    given = qkv(used + 2, num_heads, head_dim, device=device, dtype=torch.bfloat16)

    def plain(q, k, v):
        out = torch.zeros_like(q)
        for own in filter(None, rows):
            one = F.scaled_dot_product_attention(*(x[own].transpose(0, 1) for x in (q, k, v)))
            out = out.index_copy(0, torch.tensor(own, device=device), one.transpose(0, 1))
        return out

    rounded = gradients(plain, *given)
    exact = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for x in given:
        x.data[used:] = float("nan")
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert_close(a[:used], e[:used], 1e-2)
        assert not a[used:].any()
        for own in filter(None, rows):
            error, allowed = (root_mean_square(x[own].double() - e[own]) for x in (a, r))
            assert error <= 2 * allowed + 1e-6, (len(own), error, allowed)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 31, 32, 33, 48, 64, 80, 128])
def test_every_length_and_width(device, head_dim):
    input_lens = [0, 1, 15, 16, 17, 31, 32, 33, 40, 200, 256]
    tape_lens = [0, 0, 0, 0, 0, 0, 0, 0, 10, 1, 0]
    assert_as_exact_as_plain_torch(input_lens, tape_lens, 1, head_dim, device)


@pytest.mark.parametrize("rows", [257, 513, 1100])
def test_lengths_that_take_several_blocks(device, rows):
    assert_as_exact_as_plain_torch([rows - 7, 33], [7, 0], 1, 32, device)


@pytest.mark.several_threads
def test_many_heads_on_several_threads(device):
    assert_as_exact_as_plain_torch([64, 50, 33, 0, 97], [0, 3, 1, 0, 2], 5, 40, device)
