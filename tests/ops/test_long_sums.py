"""float32 sums over many rows, features or reads are about as exact as torch's own.

What one long chain of additions rounds off grows with its length, and where all numbers have one
sign it grows fastest. torch sums in blocks.
"""

import pytest
import torch
from checks import assert_same_bits

from adatape_kernels import reference
from adatape_kernels.ops import FFN

OP = "add_layer_norm", "dual_ffn", "tape_gather", "tape_read", "tape_select", "accumulate_rows"
pytestmark = pytest.mark.backends("cpp")
signs = pytest.mark.parametrize("sign", ["one", "both"])


def numbers(sign, *shape):
    """Random numbers: from 1 to 2, or normal ones."""
    return 1 + torch.rand(shape) if sign == "one" else torch.randn(shape)


def assert_as_exact(actual, plain, exact, factor=2.0):
    """The root mean square of the errors is at most `factor` times that of plain torch's."""
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (actual, plain))
    assert error <= factor * allowed, (error, allowed)


@signs
def test_normalised_rows_and_gradients_of_weight_and_bias(device, sign):
    """48 features: a mean that were multiplied by 1 / 48 would be too small in every row."""
    x, branch, dtotal, dnormed = (numbers(sign, 8192, 48) for _ in range(4))
    weight, bias = numbers(sign, 48), numbers(sign, 48)

    def in_both_directions(x, branch, dtotal, dnormed, weight, bias, by=reference):
        total, *rest = by.add_layer_norm(x, branch, weight, bias, 1e-6)
        return rest + list(by.add_layer_norm_bwd(dtotal, dnormed, total, weight, *rest[1:]))

    given = x, branch, dtotal, dnormed, weight, bias
    actual, plain = in_both_directions(*given, by=torch.ops.adatape), in_both_directions(*given)
    for each in zip(actual, plain, in_both_directions(*(t.double() for t in given)), strict=True):
        assert_as_exact(*each)


def test_mean_and_deviation_of_wide_rows(device):
    x, weight = torch.randn(64, 1 << 14), torch.ones(1 << 14)
    actual = torch.ops.adatape.add_layer_norm(x, torch.zeros_like(x), weight, 0 * weight, 1e-6)
    exact = x.double().mean(1), (x.double().var(1, correction=0) + 1e-6).rsqrt()
    plain = x.mean(1), (x.var(1, correction=0) + 1e-6).rsqrt()
    for each in zip(actual[2:], plain, exact, strict=True):
        assert_as_exact(*each)


@signs
def test_gradients_of_biases(device, sign):
    rows, dim, hidden = 1 << 15, 4, 48
    x, dy = numbers(sign, rows, dim), numbers(sign, rows, dim)
    shapes = [((g * hidden, dim), (g * hidden,), (dim, hidden), (dim,)) for g in (1, 2)]
    both = [FFN(*(numbers(sign, *s) / s[-1] for s in each)) for each in shapes]
    hiddens = reference.dual_ffn(x, rows // 2, *both)[1:]
    actual = torch.ops.adatape.dual_ffn_bwd(
        dy, x, *hiddens, rows // 2, None, "gelu_tanh", *both[0], *both[1]
    )
    exact = reference.dual_ffn_bwd(
        *(t.double() for t in (dy, x, *hiddens)), *(FFN(*(p.double() for p in f)) for f in both)
    )
    plain = reference.dual_ffn_bwd(dy, x, *hiddens, *both)
    for i in range(2):
        assert_as_exact(actual[2 + 4 * i], plain[1 + i].b1, exact[1 + i].b1)


def reads_of_one_entry(number, entry=1):
    """Reads of one token each: all of them of one entry."""
    indices = torch.full((number, 1, 1), entry, dtype=torch.int32)
    return indices, torch.rand(number, 1, 1), torch.ones(number, dtype=torch.int32)


@signs
@pytest.mark.parametrize("width", [37, 64])
def test_gradient_of_an_entry_that_many_examples_read(device, sign, width):
    """torch's index_add, by which plain torch gathers it, is a chain of additions."""
    bank, dtape = numbers(sign, 3, width), numbers(sign, 4096, width)
    given = reads_of_one_entry(4096)
    actual, _ = torch.ops.adatape.tape_gather_bwd(dtape, bank, *given)
    assert not actual[[0, 2]].any()
    plain, _ = reference.tape_gather_bwd(dtape, bank, *given)
    exact = (given[1].view(-1, 1).double() * dtape.double()).sum(0)
    assert_as_exact(actual[1], plain[1], exact, factor=0.4)


@signs
def test_gradient_of_an_entry_that_is_key_and_value(device, sign):
    width, key_dim, number = 37, 24, 4096
    bank, query = numbers(sign, 3, width), numbers(sign, number, key_dim)
    indices, weights, counts = reads_of_one_entry(number)
    given = (
        *(query, bank, numbers(sign, number, width), numbers(sign, number, 1, 1)),
        *(numbers(sign, number), weights, indices, counts, True, "entropy"),
    )
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given]
    actual = torch.ops.adatape.tape_read_bwd(*given)[1]
    exact, plain = reference.tape_read_bwd(*wide)[1], reference.tape_read_bwd(*given)[1]
    assert_as_exact(actual, plain, exact, factor=0.5)


def test_bits_of_a_long_segment_are_its_own(device):
    """They depend neither on the other entries nor on where the segment's reads stand."""
    dtape = torch.randn(400, 37)
    indices, weights, counts = reads_of_one_entry(400)
    others = torch.arange(400) % 4 == 1
    alone = [t[~others] for t in (dtape, indices, weights, counts)]
    expected = torch.ops.adatape.tape_gather_bwd(alone[0], torch.zeros(3, 37), *alone[1:])[0]
    indices[others] = (torch.arange(100) % 2 * 2).view(-1, 1, 1).int()
    actual = torch.ops.adatape.tape_gather_bwd(dtape, torch.zeros(3, 37), indices, weights, counts)
    assert_same_bits(actual[0][1], expected[1])


@signs
def test_gradients_of_the_weights_of_wide_rows(device, sign):
    width, number = 1 << 14, 64
    rows, dtape = numbers(sign, number, width), numbers(sign, number, width)
    indices = torch.arange(number, dtype=torch.int32).view(-1, 1, 1)
    _, weights, counts = reads_of_one_entry(number)
    exact, plain = (rows.double() * dtape.double()).sum(1), (rows * dtape).sum(1)
    gathered = torch.ops.adatape.tape_gather_bwd(dtape, rows, indices, weights, counts)[1]
    assert_as_exact(gathered.flatten(), plain, exact)
    source, ones = torch.arange(number, dtype=torch.int32), torch.ones(number)
    accumulated = torch.ops.adatape.accumulate_rows_bwd(dtape, rows, rows, source, ones, ones)
    for actual in accumulated[2:]:
        assert_as_exact(actual, plain, exact)


@signs
@pytest.mark.parametrize("key_dim", [64, 1024])
def test_gradients_of_wide_queries_and_keys(device, sign, key_dim):
    query, keys = numbers(sign, 32, key_dim), numbers(sign, 64, key_dim)
    indices = torch.stack([torch.randperm(64)[:12] for _ in range(32)]).view(32, 3, 4).int()
    given = (
        *(query, keys, numbers(sign, 32, 3, 4), numbers(sign, 32), indices),
        *(torch.full((32,), 3, dtype=torch.int32), True, "entropy"),
    )
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given]
    ways = torch.ops.adatape.tape_select_bwd, reference.tape_select_bwd
    actual, plain = (way(*given) for way in ways)
    for each in zip(actual, plain, reference.tape_select_bwd(*wide), strict=True):
        assert_as_exact(*each)
