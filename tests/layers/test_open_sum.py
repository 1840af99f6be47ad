"""The sum at the end of a layer and the norm at the start of the next one, by one op."""

import pytest
import torch
from torch import nn

from adatape_kernels import ElasticBatch, layers
from adatape_kernels.layers.open_sum import OpenSum
from adatape_kernels.ops.op import record

OP = None
DIM, DEPTH = 16, 4


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
    return ElasticBatch.from_padded(torch.randn(3, 7, DIM).to(dtype).requires_grad_())


def norms_of(model, x, **options):
    """Return how often the op and torch's own LayerNorm ran."""
    with record() as ran, torch.profiler.profile() as profile:
        model(x, **options)
    own = sum(each.count for each in profile.key_averages() if each.key == "aten::layer_norm")
    return sum(each.op == "add_layer_norm" for each in ran), own


@pytest.mark.parametrize("reads", [False, True])
def test_every_norm_behind_a_sum_is_the_op_s(reads):
    bank = torch.randn(3, 9, DIM) if reads else None
    by_op, by_torch = norms_of(encoder(reads), batch(), bank=bank)
    # The first layer's norm has no sum before it, nor has the one behind a read, which itself norms
    # its bank and its query.
    assert by_op == 2 * DEPTH - reads
    assert by_torch == 1 + 3 * reads


def by_single_layers(model, x, bank=None):
    return model(x, bank, apply=lambda layer, rows: layer(rows))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("norm_first", [True, False])
def test_results_and_gradients_are_those_of_single_layers(reads, norm_first):
    model, x = encoder(reads, norm_first=norm_first).double(), batch(torch.float64)
    bank = torch.randn(3, 9, DIM, dtype=torch.float64) if reads else None
    inputs, found = [x.data, *model.parameters()], []
    for y, _ in (model(x, bank), by_single_layers(model, x, bank)):
        weights = torch.arange(y.data.numel()).view_as(y.data).sin()
        grads = torch.autograd.grad((y.data * weights).sum(), inputs, allow_unused=True)
        found.append([y.data, *(grad for grad in grads if grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_dropped_branches_are_those_of_single_layers():
    model, x = encoder(dropout=0.3, stochastic_depth=0.5), batch()
    torch.manual_seed(1)
    y, _ = model(x)
    torch.manual_seed(1)
    expected, _ = by_single_layers(model, x)
    torch.testing.assert_close(y.data, expected.data)


def test_hooks_on_layers_are_given_batches():
    model, seen = encoder(), []
    plain, _ = model(x := batch())
    for layer in model.layers[1:3]:
        layer.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    y, _ = model(x)
    assert [type(each) for each in seen] == 4 * [ElasticBatch]
    torch.testing.assert_close(y.data, plain.data)


class DoublingLayer(layers.ElasticEncoderLayer):
    def forward(self, x):
        assert isinstance(x, ElasticBatch)
        y = super().forward(x)
        return y.with_data(2 * y.data)


def test_layers_of_other_classes_are_given_batches():
    model = encoder()
    model.layers[2] = DoublingLayer(DIM, 2, 32, 8)
    x = batch()
    torch.testing.assert_close(model(x)[0].data, by_single_layers(model, x)[0].data)


def test_a_final_norm_of_another_kind_is_called_without_spare_rows():
    model, seen = encoder().bfloat16(), []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    x = ElasticBatch.from_packed(torch.randn(12, DIM, dtype=torch.bfloat16), offsets)
    model(x)
    assert seen == [12]
    model.norm = nn.Identity()
    assert len(model(x)[0].data) == 12


def test_a_wider_branch_widens_the_stream():
    x = batch(torch.bfloat16)
    rows, norm = x.data.detach(), nn.LayerNorm(DIM)
    total, normed = OpenSum(x, torch.full_like(rows, 1e-4, dtype=torch.float32)).normed(norm)
    assert total.data.dtype == torch.float32
    torch.testing.assert_close(total.data, rows.float() + 1e-4)
    torch.testing.assert_close(normed, norm(rows.float() + 1e-4))
