import itertools

import pytest
import torch
from checks import assert_close, refused
from torch import nn

from adatape_kernels import ElasticBatch, reference
from adatape_kernels.layers import (
    DualFFN,
    ElasticAttention,
    ElasticEncoder,
    ElasticEncoderLayer,
    TapeReader,
)

DIM, HEADS, HIDDEN = 24, 3, 40


def ragged(lens=(5, 0, 7, 1), tape_lens=None, dim=DIM):
    mask = torch.arange(max(lens)) < torch.tensor(lens).unsqueeze(1)
    tape_lens = None if tape_lens is None else torch.tensor(tape_lens)
    return ElasticBatch.from_padded(torch.randn(len(lens), max(lens), dim), mask, tape_lens)


def torch_layer(**options):
    return nn.TransformerEncoderLayer(
        DIM,
        HEADS,
        HIDDEN,
        dropout=0.0,
        activation=lambda x: nn.functional.gelu(x, approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        **options,
    ).eval()


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def reader(**options):
    defaults = {"num_tape_tokens": 4, "topk": 2, "halt_threshold": 1.5, "bank_size": 30}
    return randomise(TapeReader(DIM, **{**defaults, **options}))


def test_a_torch_encoder_layer_loads_and_gives_its_outputs():
    theirs = randomise(torch_layer())
    ours = ElasticEncoderLayer(DIM, HEADS, HIDDEN)
    assert not any(ours.load_state_dict(theirs.state_dict()))
    x = torch.randn(3, 9, DIM)
    y, mask = ours(ElasticBatch.from_padded(x)).to_padded()
    assert mask.all()
    assert_close(y, theirs(x).detach(), 1e-5)


def test_a_torch_encoder_layer_loads_beside_a_tape_feed_forward():
    ours = ElasticEncoderLayer(DIM, HEADS, HIDDEN, tape_ffn_dim=16)
    result = ours.load_state_dict(torch_layer().state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {"tape_linear1", "tape_linear2"}


def test_a_torch_encoder_loads_and_ignores_padding():
    theirs = randomise(
        nn.TransformerEncoder(torch_layer(), 2, nn.LayerNorm(DIM, 1e-6), enable_nested_tensor=False)
    )
    ours = ElasticEncoder([ElasticEncoderLayer(DIM, HEADS, HIDDEN) for _ in range(2)], DIM)
    ours.load_state_dict(theirs.state_dict())
    x, lens = torch.randn(3, 9, DIM), torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lens.unsqueeze(1)
    encoded, reads = ours(ElasticBatch.from_padded(x, mask))
    y, out_mask = encoded.to_padded()
    assert reads == ()
    assert torch.equal(out_mask, mask)
    expected = theirs(x, src_key_padding_mask=~mask).detach()
    assert_close(y[mask], expected[mask], 1e-5)


def test_dual_ffn_routes_each_kind_of_row():
    layer = randomise(DualFFN(DIM, HIDDEN, 16))
    x = ragged((5, 0, 7, 3), (2, 0, 7, 0))
    y = layer(x)
    inputs = x.data[: x.num_input_rows]
    act = nn.functional.gelu(layer.linear1(inputs), approximate="tanh")
    assert_close(y.data[: x.num_input_rows], layer.linear2(act).detach(), 1e-6)
    tape = layer.tape_linear2(nn.functional.glu(layer.tape_linear1(x.data[x.num_input_rows :])))
    assert_close(y.data[x.num_input_rows :], tape.detach(), 1e-6)


def test_dual_ffn_without_a_tape_one_sends_every_row_through_the_input_one():
    layer = randomise(DualFFN(DIM, HIDDEN))
    x = ragged((5, 4), (2, 1))
    act = nn.functional.gelu(layer.linear1(x.data), approximate="tanh")
    assert_close(layer(x).data, layer.linear2(act).detach(), 1e-6)


def test_the_query_of_a_gap_reader_averages_inputs_and_tape():
    layer = reader(query="gap")
    first, _ = layer(ragged((3, 2)))
    again = reader(query="gap")
    _, selection = again(first)
    packed, cu = first.to_packed()
    means = torch.stack([packed[a:b].mean(0) for a, b in itertools.pairwise(cu.tolist())])
    expected = reference.tape_select(
        again.bank_norm(means),
        again.bank_norm(again.tape_tokens),
        num_tape_tokens=4,
        topk=2,
        halt_threshold=1.5,
    )
    assert torch.equal(selection.indices, expected.indices)
    assert_close(selection.weights, expected.weights.detach(), 1e-5)


def test_a_reader_takes_banks_of_different_lengths():
    layer = reader(bank_size=0, halt_threshold=9.0)
    bank = torch.randn(3, 30, DIM)
    lens = torch.tensor([30, 5, 1])
    x, selection = layer(ragged((3, 2, 1)), bank, bank_lens=lens)
    assert selection.counts.tolist() == [4, 2, 0]
    assert x.tape_lens.tolist() == [4, 2, 0]
    assert (selection.indices.flatten(1).amax(1) < lens).all()


@pytest.mark.parametrize("tape_mlp_dim", [0, 8])
def test_capacity_changes_no_row_and_leaves_the_unused_ones_zero(tape_mlp_dim):
    layer = reader(tape_mlp_dim=tape_mlp_dim)
    stack = randomise(ElasticEncoderLayer(DIM, HEADS, HIDDEN, 16))
    x = ragged((3, 5, 2))
    exact, selection = layer(x)
    roomy, again = layer(x, capacity=40)
    used = x.num_input_rows + int(selection.counts.sum())
    assert len(exact.data) == used < len(roomy.data) == x.num_input_rows + 40
    assert torch.equal(selection.indices, again.indices)
    for batch, limited in ((exact, roomy), (stack(exact), stack(roomy))):
        assert_close(limited.data[:used], batch.data.detach(), 1e-6)
        assert not limited.data[used:].any()


def test_dropout_and_noise_act_in_training_only():
    options = {"dropout": 0.3, "attention_dropout": 0.3, "stochastic_depth": 0.3}
    layer = randomise(ElasticEncoderLayer(DIM, HEADS, HIDDEN, 16, **options))
    plain = ElasticEncoderLayer(DIM, HEADS, HIDDEN, 16)
    plain.load_state_dict(layer.state_dict())
    x = ragged((5, 3, 7), (2, 0, 3))
    assert not torch.equal(layer(x).data, layer(x).data)
    assert torch.equal(layer.eval()(x).data, plain(x).data)
    noisy = reader(query_noise=3.0)
    assert not torch.equal(noisy(x)[1].indices, noisy(x)[1].indices)
    noisy.eval()
    assert torch.equal(noisy(x)[1].indices, noisy(x)[1].indices)


def test_dropout_keeps_the_mean():
    layer = randomise(ElasticEncoderLayer(DIM, HEADS, HIDDEN, 16, dropout=0.1))
    attention = randomise(ElasticAttention(DIM, HEADS, dropout=0.2))
    x = ragged((5, 3), (2, 0))
    for module, sample in (
        (attention, lambda: attention(x).data),
        (layer, lambda: layer.feed_forward(x).data),
    ):
        with torch.no_grad():
            mean = torch.stack([sample() for _ in range(600)]).mean(0)
            module.eval()
            exact = sample()
        assert (mean - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_stochastic_depth_drops_whole_branches_of_an_example():
    layer = randomise(ElasticEncoderLayer(DIM, HEADS, HIDDEN, stochastic_depth=0.5))
    x = ragged((4,) * 64)
    with torch.no_grad():
        changed = (layer(x).data != x.data).view(64, 4, DIM)
    per_example = changed.any(2)
    # A row is changed in all of its example's rows or in none; both branches drop with 1/4.
    assert torch.equal(per_example.any(1), per_example.all(1))
    assert 4 <= int((~per_example.any(1)).sum()) <= 30


def test_bank_dropout_hides_entries():
    layer = reader(bank_dropout=0.9, halt_threshold=9.0, bank_size=20)
    _, selection = layer(ragged((2,) * 50))
    assert 0 < selection.counts.float().mean() < 2
    layer.eval()
    assert (layer(ragged((2,) * 50))[1].counts == 4).all()


def test_autocast_runs_products_in_low_precision():
    layer = randomise(ElasticEncoderLayer(DIM, HEADS, HIDDEN, 16))
    x = ragged((5, 3), (2, 0))
    exact = layer(x).data
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x).data
        assert layer.feed_forward(x).data.dtype == torch.bfloat16
    assert low.dtype == torch.float32
    error = (low - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.03
    low.sum().backward()
    assert layer.linear1.weight.grad.dtype == torch.float32


def test_bad_arguments():
    with refused("num_heads", "24", "5"):
        ElasticAttention(24, 5)
    with refused("query", "'cls'"):
        reader(query="cls")
    with refused("key_split", "25"):
        reader(key_split=25)
    with refused("bank", "None"):
        reader(bank_size=0)(ragged((2, 3)))
    with refused("kind", "token"):
        reader()(ragged((2, 0)))
    with refused("bank", "[4,]", "(3, 30, 24)"):
        reader(query="gap")(ragged(), torch.randn(3, 30, DIM))
    with refused("readers", "0 to 0"):
        ElasticEncoder([ElasticEncoderLayer(DIM, HEADS, HIDDEN)], DIM, {1: reader()})
    with refused("capacity", "got 1"):
        reader(query="gap")(ragged(), capacity=1)
