"""The sum at the end of a layer and the norm at the start of the next one, by one op."""

import functools

import pytest
import torch
from checks import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from adatape_kernels import ElasticBatch, layers
from adatape_kernels.layers.open_sum import OpenSum
from adatape_kernels.ops.op import record

OP = None
DIM, DEPTH = 16, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def encoder(reads=False, **options):
    torch.manual_seed(0)
    stack = [layers.ElasticEncoderLayer(DIM, 2, 32, 8, **options) for _ in range(DEPTH)]
    reader = layers.TapeReader(DIM, num_tape_tokens=2, topk=2, halt_threshold=9.0)
    made = layers.ElasticEncoder(stack, DIM, {2: reader} if reads else None)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def batch(dtype=torch.float32):
    offsets = torch.tensor([0, 5, 12, 37], dtype=torch.int32)
    rows = torch.randn(37, DIM, generator=torch.Generator().manual_seed(1))
    return ElasticBatch.from_packed(rows.to(dtype).requires_grad_(), offsets)


def bank_of(reads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 9, DIM, generator=generator).to(dtype) if reads else None


def results(model, x, bank=None, **options):
    """Return the encoded rows, and the gradients of the rows given and of all parameters."""
    torch.manual_seed(3)
    y, _ = model(x, bank, **options)
    weights = torch.arange(y.data.numel()).view_as(y.data).sin().to(y.data.dtype)
    model.zero_grad()
    x.data.grad = None
    (y.data * weights).sum().backward()
    assert x.data.grad.any()
    grads = [parameter.grad for parameter in model.parameters()]
    return [y.data, x.data.grad, *(grad for grad in grads if grad is not None)]


def assert_all_same_bits(found, expected):
    for actual, same in zip(found, expected, strict=True):
        assert_same_bits(actual, same)


@pytest.mark.parametrize("reads", [False, True])
def test_every_norm_of_the_stream_is_the_op_s(reads):
    model, bank = encoder(reads), bank_of(reads)
    with record() as ran, torch.profiler.profile() as profile:
        model(batch(), bank)
    own = sum(each.count for each in profile.key_averages() if each.key == "aten::layer_norm")
    assert sum(each.op == "add_layer_norm" for each in ran) == 2 * DEPTH + 1
    assert own == 2 * reads  # of its bank and of its query


def one_by_one(layer, x):
    return layer(x)


def reentrant(layer, x):
    """A checkpoint that is given tensors, and sees those alone."""

    def again(rows):
        return layer(x.with_data(rows)).data

    return x.with_data(checkpoint(again, x.data, use_reentrant=True))


WAYS = {
    "one by one": one_by_one,
    "checkpoint": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": reentrant,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("norm_first", [True, False])
def test_bits_are_those_of_layers_that_end_with_their_sum(reads, norm_first, dtype, way):
    model, x = encoder(reads, norm_first=norm_first).to(dtype), batch(dtype)
    bank = bank_of(reads, dtype)
    found = results(model, x, bank)
    assert_all_same_bits(results(model, x, bank, apply=WAYS[way]), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_same_where_branches_are_dropped(dtype):
    model, x = encoder(dropout=0.3, stochastic_depth=0.5).to(dtype), batch(dtype)
    found = results(model, x)
    assert_all_same_bits(results(model, x, apply=one_by_one), found)


def test_bits_are_the_same_under_autocast():
    model, x = encoder(True), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, x, bank_of(True))
        assert_all_same_bits(results(model, x, bank_of(True), apply=one_by_one), found)


def test_results_are_those_of_plain_torch():
    model, x = encoder().double(), batch(torch.float64)
    y, _ = model(x)
    rows = x.data
    for layer in model.layers:
        rows = rows + layer.self_attn(x.with_data(layer.norm1(rows))).data
        rows = rows + layer.feed_forward(x.with_data(layer.norm2(rows))).data
    torch.testing.assert_close(y.data, model.norm(rows), rtol=1e-9, atol=1e-9)


def test_hooks_on_layers_are_given_batches_and_change_no_bit():
    model, seen, x = encoder(), [], batch()
    plain = results(model, x)
    for layer in model.layers[1:3]:
        layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    assert_all_same_bits(results(model, x), plain)
    assert [type(each) for each in seen] == 4 * [ElasticBatch]


class DoublingLayer(layers.ElasticEncoderLayer):
    def forward(self, x):
        assert isinstance(x, ElasticBatch)
        y = super().forward(x)
        return y.with_data(2 * y.data)


def test_layers_of_other_classes_are_given_batches():
    model = encoder()
    model.layers[2] = DoublingLayer(DIM, 2, 32, 8)
    x = batch()
    found = results(model, x)
    assert_all_same_bits(results(model, x, apply=one_by_one), found)


def test_a_final_norm_of_another_kind_is_called_without_spare_rows():
    model, seen = encoder().bfloat16(), []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    x = batch(torch.bfloat16)
    model(x)
    assert seen == [37]
    model.norm = nn.Identity()
    assert len(model(x)[0].data) == 37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_without_a_branch_is_what_was_given(dtype):
    rows = batch(dtype).data.detach()
    rows[0], rows[1, 0], rows[2, 0] = -0.0, torch.nan, torch.inf
    x, norm = batch(dtype).with_data(rows), nn.LayerNorm(DIM, dtype=dtype)
    total, normed = OpenSum(x, None).normed(norm)
    assert_same_bits(total.data, rows)
    torch.testing.assert_close(normed, norm(rows), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_with_a_branch_is_rounded_as_torch_s_is(dtype):
    x, norm = batch(dtype), nn.LayerNorm(DIM, dtype=dtype)
    branch = torch.randn_like(x.data)
    total, normed = OpenSum(x, branch).normed(norm)
    closed = OpenSum(x, branch).closed()
    assert_same_bits(total.data, closed.data)
    assert_same_bits(normed, OpenSum(closed, None).normed(norm)[1])


def test_a_wider_branch_widens_the_stream():
    x = batch(torch.bfloat16)
    rows, norm = x.data.detach(), nn.LayerNorm(DIM)
    total, normed = OpenSum(x, torch.full_like(rows, 1e-4, dtype=torch.float32)).normed(norm)
    assert total.data.dtype == torch.float32
    torch.testing.assert_close(total.data, rows.float() + 1e-4)
    torch.testing.assert_close(normed, norm(rows.float() + 1e-4))


def test_a_batch_without_rows():
    model = encoder()
    x = ElasticBatch.from_packed(torch.zeros(0, DIM), torch.zeros(3, dtype=torch.int32))
    assert model(x)[0].data.shape == (0, DIM)
