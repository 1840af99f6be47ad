"""The models of the parity table, and the reader whose query never moves."""

import pytest
import torch

import adatape_kernels as ak
from adatape_kernels.data.parity_sequences import ParitySequences
from adatape_kernels.models import AdaTapeParity, AdaTapeParityConfig
from adatape_kernels.recipes.parity.fixed_query import FixedQueryReader
from adatape_kernels.recipes.parity.parity_models import MODELS, new_model, num_parameters


@pytest.mark.parametrize("sequence_token", [True, False])
@pytest.mark.parametrize("length", [1, 33, 64])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_about_equal(name, length, sequence_token):
    """Within 2 per cent of AdaTape's: widths are multiples of 8."""
    model, ours = (
        new_model(each, length, sequence_token=sequence_token) for each in (name, "adatape")
    )
    assert 0.98 < num_parameters(model) / num_parameters(ours) < 1.02
    assert model(torch.zeros(2, length, 3)).logits.shape == (2, 2)


def literal_fixed_read(query, keys, tokens, topk, threshold, hidden):
    """Return indices, weights and ponder of one example, entry by entry."""
    scores = (keys @ query).tolist()
    order = sorted((m for m in range(len(keys)) if m not in hidden), key=lambda m: (-scores[m], m))
    halting, ponder, indices, weights = 0.0, 0.0, [], []
    while len(indices) < tokens and halting < threshold and len(order) >= topk:
        chosen, order = order[:topk], order[topk:]
        w = torch.softmax(torch.tensor([scores[m] for m in chosen]) / len(query) ** 0.5, 0)
        indices.append(chosen)
        weights.append(w)
        halting += float(w[0])
        ponder += 1 - float((w * w).sum())
    return indices, weights, ponder


@pytest.mark.parametrize("threshold", [0.0, 1.4, 99.0])
@pytest.mark.parametrize("bank_size", [2, 5, 9])
def test_fixed_query_is_the_literal_loop_that_never_moves_it(threshold, bank_size):
    torch.manual_seed(3)
    reader = FixedQueryReader(8, num_tape_tokens=3, topk=2, halt_threshold=threshold, key_split=2)
    x = ak.ElasticBatch.from_padded(torch.randn(4, 5, 8))
    bank, lens = torch.randn(4, bank_size, 8), torch.tensor([bank_size, 0, 1, bank_size])
    y, read = reader(x, bank, bank_lens=lens)
    rows = y.to_padded()[0]
    values, query, _ = reader.normalised(bank, x.pool("token"))
    for i in range(4):
        keys = values[i, : lens[i], :4]
        indices, weights, ponder = literal_fixed_read(query[i, :4], keys, 3, 2, threshold, set())
        assert read.counts[i] == len(indices)
        assert read.indices[i].tolist() == indices + [[-1, -1]] * (3 - len(indices))
        torch.testing.assert_close(read.ponder[i].item(), ponder, atol=1e-5, rtol=1e-5)
        for s, w in enumerate(weights):
            torch.testing.assert_close(read.weights[i, s], w)
            torch.testing.assert_close(rows[i, 5 + s], w @ values[i, indices[s]])
        assert not read.weights[i, len(indices) :].any()


def test_fixed_query_hides_what_dropout_hides_and_takes_gradients():
    torch.manual_seed(0)
    reader = FixedQueryReader(
        8, num_tape_tokens=4, topk=1, halt_threshold=99.0, bank_dropout=0.5
    ).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(3, 9, 8, dtype=torch.float64, requires_grad=True)

    def tape(x, bank):
        torch.manual_seed(1)  # the same tokens are hidden at each call
        y, read = reader(ak.ElasticBatch.from_padded(x), bank)
        return y.data, read.ponder

    assert torch.autograd.gradcheck(tape, (x, bank), fast_mode=True)


def test_without_recursion_has_adatapes_parameters():
    plain, ablated = (new_model(name, 8) for name in ("adatape", "adatape-fixed-query"))
    shapes = {name: tensor.shape for name, tensor in ablated.state_dict().items()}
    assert {name: tensor.shape for name, tensor in plain.state_dict().items()} == shapes
    assert isinstance(ablated.encoder.readers["0"], FixedQueryReader)
    assert not isinstance(plain.encoder.readers["0"], FixedQueryReader)


def test_without_a_sequence_token_a_model_knows_its_tape_alone():
    """The order and whatever is not read change nothing."""
    torch.manual_seed(0)
    model = new_model("adatape", 10, sequence_token=False).eval()
    assert model.sequence_embed is None
    symbols = torch.randint(-1, 2, (5, 10))
    inputs = ParitySequences(symbols, symbols[:, 0]).one_hot()
    logits = model(inputs).logits
    shuffled = inputs[:, torch.randperm(10)]
    torch.testing.assert_close(model(shuffled).logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.padded()(inputs).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sequence_token", [True, False])
def test_shorter_sequences_lack_the_features_of_their_last_symbols(sequence_token):
    torch.manual_seed(0)
    model = new_model("adatape", 10, sequence_token=sequence_token).eval()
    inputs = torch.nn.functional.one_hot(torch.randint(0, 3, (5, 6)), 3).float()
    tokens, bank = model.embed(inputs)
    assert bank.shape == (5, 6, 96)
    if sequence_token:
        layer = model.sequence_embed
        expected = inputs.flatten(1) @ layer.weight[:, : 6 * 3].T + layer.bias
        torch.testing.assert_close(tokens[:, 1], expected)
    output = model(inputs)
    assert output.logits.shape == (5, 2) and output.tape_lens.max() <= 3
    torch.testing.assert_close(model.padded()(inputs).logits, output.logits, atol=1e-4, rtol=1e-4)
    for wrong in (inputs[:, :1], torch.zeros(5, 11, 3), torch.zeros(5, 10, 2), torch.zeros(5, 10)):
        with pytest.raises(ValueError, match=r"^inputs: expected \(batch, \(2 to 10, 3\)\), got"):
            model(wrong)


def test_a_learnable_bank_takes_sequences_down_to_one_symbol():
    sizes = dict(num_classes=2, dim=8, depth=1, num_heads=2, ffn_dim=8, seq_len=10, topk=3)
    model = AdaTapeParity(AdaTapeParityConfig(**sizes, bank="learn", bank_size=20)).eval()
    assert model(torch.zeros(4, 1, 3)).logits.shape == (4, 2)
    for wrong in (torch.zeros(4, 0, 3), torch.zeros(4, 11, 3)):
        with pytest.raises(ValueError, match=r"^inputs: expected \(batch, \(1 to 10, 3\)\), got"):
            model(wrong)


def test_keys_are_short_without_a_sequence_token():
    for name in MODELS:
        if name.startswith("adatape"):
            with_token, without = (
                new_model(name, 8, sequence_token=token).encoder.readers["0"].key_dim
                for token in (True, False)
            )
            assert with_token == 96
            assert without == (96 if name == "adatape-wide-keys" else 12)


@pytest.mark.parametrize("choices", [dict(pooling="mean", query="gap"), dict(bank="learn")])
def test_without_a_sequence_token_something_must_read_the_sequence(choices):
    with pytest.raises(ValueError, match=r"^sequence_token: expected True unless"):
        AdaTapeParityConfig(
            num_classes=2,
            dim=8,
            depth=1,
            num_heads=2,
            ffn_dim=8,
            sequence_token=False,
            **choices,
        )


@pytest.mark.parametrize("sequence_token", [True, False])
def test_a_program_takes_any_batch(sequence_token):
    from torch.export import Dim, export

    model = new_model("adatape", 8, sequence_token=sequence_token).eval()
    shapes = ({0: Dim("batch")},)
    program = export(model, (torch.zeros(3, 8, 3),), dynamic_shapes=shapes, strict=False)
    assert program.module()(torch.zeros(5, 8, 3)).logits.shape == (5, 2)
