import dataclasses

import pytest
import torch
from checks import assert_close, refused
from torch import nn

from adatape_kernels import models, reference
from adatape_kernels.models import (
    AdaTapeParity,
    AdaTapeParityConfig,
    AdaTapeViT,
    AdaTapeViTConfig,
    adatape_vit,
)
from adatape_kernels.models.padded import batched_topk_select

BASE = AdaTapeViTConfig(
    num_classes=7,
    dim=24,
    depth=3,
    num_heads=3,
    ffn_dim=48,
    tape_ffn_dim=16,
    num_tape_tokens=5,
    topk=3,
    halt_threshold=1.5,
    key_split=2,
    image_size=16,
    patch_size=8,
    bank_patch_size=4,
)
VARIANTS = {
    "input bank": {},
    "learned bank, two reads": {"bank": "learn", "bank_size": 50, "read_layers": (0, 2)},
    "gap, late read": {"query": "gap", "pooling": "mean", "read_layers": (1, 2)},
    "max pooling": {"query": "gap", "pooling": "max", "average_query": False},
    "sum pooling": {"query": "gap", "pooling": "sum", "loss_type": "max"},
    "shared feed-forward, projection": {"tape_ffn_dim": 0, "tape_mlp_dim": 8},
    "exhausted bank": {"halt_threshold": 99.0, "bank_patch_size": 8, "topk": 2},
    "no tape at all": {"num_tape_tokens": 0},
    "no reads": {"read_layers": ()},
}


def build(cls=AdaTapeViT, config=BASE, **changes):
    model = cls(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def images(batch=6):
    return torch.randn(batch, 3, 16, 16)


def parity(**changes):
    config = AdaTapeParityConfig(
        num_classes=2,
        dim=24,
        depth=2,
        num_heads=2,
        ffn_dim=32,
        tape_ffn_dim=16,
        num_tape_tokens=6,
        topk=3,
        seq_len=20,
    )
    symbols = torch.randint(3, (5, 20))
    return build(AdaTapeParity, config, **changes), nn.functional.one_hot(symbols, 3).float()


def gradients(model, output, labels):
    model.zero_grad()
    model.loss(output, labels).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_results(model, inputs, run, other):
    """Both give the same reads, outputs and gradients, within rounding."""
    a, b = run(inputs), other(inputs)
    assert torch.equal(a.tape_lens, b.tape_lens)
    assert_close(a.logits, b.logits.detach(), 1e-5)
    assert_close(a.ponder, b.ponder.detach(), 1e-5)
    for x, y in zip(a.reads, b.reads, strict=True):
        assert torch.equal(x.indices, y.indices)
        assert_close(x.weights, y.weights.detach(), 1e-4)
    labels = torch.randint(2, (len(inputs),))
    ours, theirs = gradients(model, a, labels), gradients(model, b, labels)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # The exact gradient of the keys' bias, a third of in_proj_bias, is 0, since softmax cancels
        # a bias of the keys; what the models compute there is rounding, within this bound.
        assert_close(ours[name], theirs[name], 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_elastic_equals_padded(variant):
    model = build(**VARIANTS[variant])
    assert_same_results(model, images(), model, model.padded())


@pytest.mark.parametrize("variant", VARIANTS)
def test_capacity_equals_exact(variant):
    model = build(**VARIANTS[variant])
    assert_same_results(model, images(), model, lambda x: model(x, capacity=40))


@pytest.mark.parametrize("bank", ["input", "learn"])
def test_parity_equals_padded(bank):
    model, sequences = parity(bank=bank, bank_size=40)
    assert_same_results(model, sequences, model, model.padded())


def test_equal_elements_of_a_parity_sequence_are_read_in_order():
    model, sequences = parity(halt_threshold=99.0)
    for sequence, indices in zip(sequences, model(sequences).reads[0].indices, strict=True):
        symbols = sequence.argmax(1)[indices.flatten().long()].tolist()
        for symbol in range(3):
            places = [i for i, s in zip(indices.flatten(), symbols, strict=True) if s == symbol]
            assert places == sorted(places)


def test_tape_lengths_differ_between_images():
    model = build(halt_threshold=1.9)
    assert len(model(images(40)).tape_lens.unique()) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_example_does_not_see_its_batch(variant):
    model, x = build(**VARIANTS[variant]), images()
    together = model(x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = model(x[order])
    assert_close(permuted.logits, together.logits[order].detach(), 1e-5)
    assert torch.equal(permuted.tape_lens, together.tape_lens[order])
    for i in range(len(x)):
        alone = model(x[i : i + 1])
        assert_close(alone.logits, together.logits[i : i + 1].detach(), 1e-5)
        assert torch.equal(alone.tape_lens, together.tape_lens[i : i + 1])


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_poisoned_image_harms_nobody_else(variant, capacity):
    model, x = build(**VARIANTS[variant]), images()
    clean = model(x, capacity=capacity)
    poisoned = x.clone()
    poisoned[2] = torch.nan
    poisoned.requires_grad_()
    output = model(poisoned, capacity=capacity)
    others = [i for i in range(len(x)) if i != 2]
    assert_close(output.logits[others], clean.logits[others].detach(), 1e-5)
    assert output.logits[2].isnan().all()
    output.logits[others].sum().backward()
    assert poisoned.grad[others].isfinite().all()


def test_empty_batch():
    model = build(read_layers=(0, 1))
    for run in (model, model.padded(), lambda x: model(x, capacity=3)):
        output = run(images(0))
        assert output.logits.shape == (0, 7)
        assert output.ponder.shape == (0, 2)
        assert output.tape_lens.tolist() == []
        output.logits.sum().backward()


def test_output_carries_the_reads():
    model = build(read_layers=(0, 2), bank="learn", bank_size=50)
    output = model(images(4))
    assert output.ponder.shape == (4, 2)
    counts = torch.stack([read.counts for read in output.reads]).sum(0)
    assert torch.equal(counts.int(), output.tape_lens)
    for read in output.reads:
        assert read.indices.shape == read.weights.shape == (4, 5, 3)


def test_loss_adds_the_ponder_loss_of_every_read():
    model = build(read_layers=(0, 2), bank="learn", bank_size=50, ponder_weight=0.5)
    output, labels = model(images(4)), torch.tensor([0, 1, 2, 3])
    expected = nn.functional.cross_entropy(output.logits, labels)
    expected = expected + 0.5 * output.ponder.sum() / 4
    assert_close(model.loss(output, labels), expected.detach(), 1e-6)


def test_training_with_every_regulariser_is_finite_and_learns():
    model = build(
        dropout=0.1,
        attention_dropout=0.1,
        stochastic_depth=0.1,
        query_noise=0.1,
        bank_dropout=0.1,
    ).train()
    x, labels = images(16), torch.arange(16) % 7
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = model.loss(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for parameter in model.parameters():
        assert parameter.isfinite().all()


@pytest.mark.parametrize(
    ("variant", "millions"), [("Ti/16", 5.5), ("S/16", 21.7), ("B/32", 87.5), ("L/16", 303.3)]
)
def test_the_sizes_are_those_of_the_vit_papers(variant, millions):
    with torch.device("meta"):
        model = adatape_vit(variant, bank="learn", read_layers=(), tape_ffn_dim=0, num_classes=10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < 0.03 * millions


def test_any_patch_size_and_defaults():
    with torch.device("meta"):
        model = adatape_vit("B/32", image_size=256)
    c = model.config
    assert (c.patch_size, c.bank_patch_size, c.num_patches, c.bank_tokens) == (32, 16, 64, 256)
    assert (c.num_classes, c.tape_ffn_dim, c.num_tape_tokens, c.topk) == (1000, 768, 10, 5)


def test_a_model_round_trips_through_its_state_dict():
    model = build()
    copy = AdaTapeViT(model.config)
    copy.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(copy.eval()(x).logits, model(x).logits)
    assert {id(p) for p in model.padded().parameters()} == {id(p) for p in model.parameters()}


def test_float64_agrees_with_float32():
    model, x = build(), images()
    low = model(x)
    high = model.double()(x.double())
    assert high.logits.dtype == torch.float64
    assert torch.equal(low.tape_lens, high.tape_lens)
    assert_close(low.logits, high.logits.detach(), 1e-4)


def test_bfloat16_reads_in_float32_and_stays_near():
    model, x = build(num_tape_tokens=2, topk=1), images()
    exact = model(x)
    low = model.bfloat16()(x.bfloat16())
    assert low.logits.dtype == torch.bfloat16
    assert low.ponder.dtype == low.reads[0].weights.dtype == torch.float32
    # With k = 1 both read every token they may; which one is a matter of rounding, if at all.
    assert torch.equal(low.tape_lens, exact.tape_lens)
    assert_close(low.logits, exact.logits.detach(), 0.1)


@pytest.mark.parametrize("capacity", [None, 60])
def test_compiles_whole_for_any_batch(capacity, fresh_compiler):
    model = build(depth=2, read_layers=(0, 1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capacity is None):
        for batch in (4, 3):
            x, labels = images(batch), torch.arange(batch)
            output, expected = compiled(x, capacity=capacity), model(x)
            assert_close(output.logits, expected.logits.detach(), 1e-5)
            ours = gradients(model, output, labels)
            for name, gradient in gradients(model, expected, labels).items():
                assert_close(ours[name], gradient, 1e-4)


def test_bad_arguments():
    with refused("variant", "'XL/16'"):
        adatape_vit("XL/16")
    with refused("variant", "'S'"):
        adatape_vit("S")
    with refused("variant", "'S/0'"):
        adatape_vit("S/0")
    with refused("options", "'tau'"):
        adatape_vit("S/16", tau=2)
    with refused("patch_size", "224", "15"):
        adatape_vit("S/15")
    with refused("bank_patch_size", "16", "5"):
        build(bank_patch_size=5)
    with refused("topk", "16", "17"):
        build(topk=17)
    with refused("bank", "'both'"):
        build(bank="both")
    with refused("pooling", "'gap'"):
        build(pooling="gap")
    with refused("query", "class token"):
        build(pooling="mean")
    with refused("read_layers", "(0, 0)"):
        build(read_layers=(0, 0))
    with refused("read_layers", "0 to 2", "3"):
        build(read_layers=(3,))
    with refused("dropout", "1.0"):
        build(dropout=1.0)
    with refused("inputs", "(3, 16, 16)", "(2, 3, 8, 8)"):
        build()(torch.randn(2, 3, 8, 8))
    model, sequences = parity()
    with refused("inputs", "20, 3)", "(5, 21, 3)"):
        model(torch.cat([sequences, sequences[:, :1]], 1))
    with refused("topk", "seq_len = 20", "21"):
        parity(topk=21)
    with refused("capacity", "got 2"):
        build()(images(), capacity=2)


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="embed"):
        models.AdaTape(BASE)


def test_the_padded_model_masks_an_example_whose_bank_is_exhausted():
    """The padded model goes on selecting for such an example; none of that is counted or NaN."""
    query, keys = torch.randn(2, 8, requires_grad=True), torch.randn(2, 9, 8, requires_grad=True)
    read_mask = torch.arange(9) >= torch.tensor([[0], [4]])
    options = {"num_tape_tokens": 4, "topk": 2, "halt_threshold": 9.0, "read_mask": read_mask}
    options |= {"average_query": True, "loss_type": "entropy"}
    found = batched_topk_select(query, keys, **options)
    expected = reference.tape_select(query, keys, **options)
    assert found.counts.tolist() == expected.counts.tolist() == [0, 2]
    grads = [
        torch.autograd.grad(x.weights.square().sum() + x.ponder.sum(), (query, keys))
        for x in (found, expected)
    ]
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)
