"""Coarse scores in bytes change nothing: a long read begins with the bits of a short one.

A bank that is read for two tokens is not packed in bytes, because that would not pay. One that is
read for ten tokens is, where the processor multiplies bytes.
"""

import pytest
import torch

from adatape_kernels import ops

pytestmark = pytest.mark.instruction_sets

SHORT, LONG = 2, 10


def read(query, keys, num_tape_tokens, topk, **options):
    return ops.tape_select(
        query,
        keys,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=100.0,
        **options,
    )


def as_it_is(keys):
    return keys


def three_rows(keys):
    return keys[..., torch.arange(keys.shape[-2]) % 3, :]


def rows_of_many_lengths(keys):
    return keys * (3 * torch.randn(*keys.shape[:-1], 1)).exp()


def one_great_number(keys):
    keys[..., 7, 3] = 1e4
    return keys


def some_nan(keys):
    keys.view(-1)[::997] = float("nan")
    return keys


def some_infinite(keys):
    keys.view(-1)[5::1009] = float("inf")
    return keys


def half_zero(keys):
    keys[..., ::2, :] = 0
    return keys


def huge(keys):
    return keys * 1e19


def tiny(keys):
    return keys * 1e-25


def close_together(keys):
    return keys[..., :1, :] + 1e-3 * keys


KINDS = [
    as_it_is,
    three_rows,
    rows_of_many_lengths,
    one_great_number,
    some_nan,
    some_infinite,
    half_zero,
    huge,
    tiny,
    close_together,
]
# The first two are banks that do not stay in a thread's second cache; features and entries end
# behind whole vectors.
SHAPES = [
    pytest.param((4, 1100, 301), id="own"),
    pytest.param((1, 3000, 256), id="own, of one example"),
    pytest.param((1000, 61), id="shared"),
    pytest.param((300, 384), id="shared, wide"),
]


@pytest.mark.parametrize("topk", [1, 5, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_read_begins_like_a_short_one(kind, shape, topk):
    torch.manual_seed(topk)
    keys = kind(torch.randn(shape)).contiguous()
    batch = shape[0] if len(shape) == 3 else 14
    query = torch.randn(batch, shape[-1])
    read_mask = torch.rand(batch, shape[-2]) < 0.3
    bank_lens = torch.randint(shape[-2] // 2, shape[-2] + 1, (batch,))
    short, long = (
        read(query, keys, tokens, topk, read_mask=read_mask, bank_lens=bank_lens)
        for tokens in (SHORT, LONG)
    )
    assert torch.equal(long.indices[:, :SHORT], short.indices)
    torch.testing.assert_close(
        long.weights[:, :SHORT], short.weights, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_so_it_does_in_16_bits(shape, dtype):
    torch.manual_seed(0)
    keys = torch.randn(*shape[:-2], 2 * shape[-2], shape[-1]).to(dtype)
    query = torch.randn(shape[0] if len(shape) == 3 else 14, shape[-1]).to(dtype)
    short, long = (read(query, keys, tokens, 5) for tokens in (SHORT, LONG))
    assert torch.equal(long.indices[:, :SHORT], short.indices)
    assert torch.equal(long.weights[:, :SHORT], short.weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_later_tokens_match_a_read_that_goes_on(shape):
    """Two tokens at a time, each read on from the merged key of the token before."""
    torch.manual_seed(1)
    keys = torch.randn(shape)
    batch = shape[0] if len(shape) == 3 else 14
    query, options = torch.randn(batch, shape[-1]), {"average_query": False}
    long = read(query, keys, LONG, 1, **options)
    read_mask = torch.zeros(batch, shape[-2], dtype=torch.bool)
    for token in range(LONG):
        one = read(query, keys, 1, 1, read_mask=read_mask, **options)
        chosen = one.indices[:, 0].long()
        assert torch.equal(chosen, long.indices[:, token].long())
        read_mask.scatter_(1, chosen, True)
        rows = keys if len(shape) == 3 else keys.expand(batch, *shape)
        query = rows.gather(1, chosen.unsqueeze(2).expand(-1, -1, shape[-1])).squeeze(1)


def roundings_of_keys(width):
    """Return a query that bytes hold as it is, the best key, which they make less, and a worse one.

    Of the worse key bytes make more. A key's first feature is as large as a byte can say.
    """
    query = torch.ones(width)
    best = torch.full((width,), 10.49)
    worse = torch.where(torch.arange(width) % 2 == 0, 10.51, 10.4)
    best[0] = worse[0] = 127
    return query, best, worse


def roundings_of_the_query(width):
    """Return a query of which bytes hold one feature, and two keys that they hold as they are."""
    query = torch.full((width,), 0.49)
    query[0] = 127
    best = torch.full((width,), 127.0)
    best[0] = 0
    worse = torch.zeros(width)
    worse[0] = 0.4 * (width - 1)
    return query, best, worse


@pytest.mark.parametrize("keys_of", [roundings_of_keys, roundings_of_the_query])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_rounding_can_change_is_allowed_for(shape, keys_of):
    """Bytes put a key behind a worse one by nearly as much as they can: exact scores have it."""
    query, best, worse = keys_of(shape[-1])
    torch.manual_seed(0)
    keys = torch.randn(shape)
    first, second, third = 7, shape[-2] - 2, 11
    keys[..., first, :] = 5 * best.max() * query  # which is the next query
    keys[..., second, :], keys[..., third, :] = best, worse
    batch = shape[0] if len(shape) == 3 else 14
    assert best @ query > worse @ query > (keys[..., 20:30, :] @ query).max()
    found = read(query.expand(batch, -1), keys, LONG, 1, average_query=False).indices[:, :2, 0]
    assert found.tolist() == [[first, second]] * batch
