"""Models whose rows leave equal their definition, word for word, and the models that mask."""

import dataclasses

import literal_classifiers as literal
import pytest
import torch

import adatape_kernels as ak
from adatape_kernels import models

SIZES = {"num_classes": 3, "dim": 16, "depth": 4, "num_heads": 2, "ffn_dim": 24}
IMAGES = {"image_size": 16, "patch_size": 8, "in_channels": 1}
# The bias of the halting unit, and how far its vector spreads: rows halt at random or all at once.
REGIMES = {"random": (-0.5, 1.0), "together": (-1.0, 0.0), "never": (-20.0, 0.0), "first": (20, 0)}
UNIVERSAL = {
    "unshared": {},
    "shared": {"distinct_layers": 1, "act_type": "accumulated", "pooling": "mean"},
    "two in turn": {"distinct_layers": 2, "force_halt": True, "num_registers": 1},
    "rows stay": {"act_level": "row", "distinct_layers": 1},
    "rows leave": {"act_level": "row", "leave": "row"},
    "rows leave, accumulated": {
        "act_level": "row",
        "leave": "row",
        "act_type": "accumulated",
        "force_halt": True,
        "act_epsilon": 0.3,
    },
}


def randomised(model):
    """In float64, with parameters of which none is zero or one."""
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def uvit(regime="random", **options):
    torch.manual_seed(5)
    model = randomised(models.UViT(models.UViTConfig(**SIZES, **IMAGES, **options)))
    bias, spread = REGIMES[regime]
    unit = model.encoder.unit.projection
    torch.nn.init.normal_(unit.weight, std=spread) if spread else torch.nn.init.zeros_(unit.weight)
    torch.nn.init.constant_(unit.bias, bias)
    return model


GATES = {"random": (2.0, 0.0), "never": (1.0, 1000.0), "first": (1.0, -1000.0)}


def avit(regime="random", **options):
    torch.manual_seed(6)
    scale, center = GATES[regime]
    gate = {"gate_scale": scale, "gate_center": center}
    return randomised(models.AViT(models.AViTConfig(**SIZES, **IMAGES, **gate, **options)))


def images(batch=4):
    return torch.randn(batch, 1, 16, 16, dtype=torch.double, requires_grad=True)


def gradients(model, objective, given):
    model.zero_grad()
    given.grad = None
    objective.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "images": given.grad}


def assert_equal(ours, theirs):
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        # A parameter that nothing reached has no gradient, or one of zero.
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def objective_of(output, cotangent):
    halted = output.halted
    value = (output.logits * cotangent).sum() + 0.1 * (halted.steps + halted.remainders).sum()
    return value if halted.means is None else value + 3 * halted.means.square().sum()


def compare(model, other, given):
    """Two models' outputs and gradients."""
    one, two = model(given), other(given)
    assert torch.equal(one.halted.steps, two.halted.steps)
    outputs = ("logits", "ponder")
    assert_equal({n: getattr(one, n) for n in outputs}, {n: getattr(two, n) for n in outputs})
    cotangent = torch.randn_like(one.logits)
    ours = gradients(model, objective_of(one, cotangent), given)
    assert_equal(ours, gradients(model, objective_of(two, cotangent), given))
    return one, two


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", UNIVERSAL)
def test_a_universal_model_equals_its_definition(kind, regime):
    model, given = uvit(regime, **UNIVERSAL[kind]), images()
    output = model(given)
    cotangent = torch.randn_like(output.logits)
    ours = gradients(model, objective_of(output, cotangent), given)
    found = literal.universal(model, given)
    by_row = model.config.act_level == "row"
    logits, steps, rest = (torch.stack(parts) for parts in zip(*found, strict=True))
    if not by_row:
        steps, rest = steps[:, 0], rest[:, 0]
    assert torch.equal(output.halted.steps, steps)
    ponder = (steps + rest).view(len(given), -1).mean(1, keepdim=True)
    assert_equal(
        {"logits": output.logits, "remainders": output.halted.remainders, "ponder": output.ponder},
        {"logits": logits, "remainders": rest, "ponder": ponder},
    )
    value = (logits * cotangent).sum() + 0.1 * (steps + rest).sum()
    assert_equal(ours, gradients(model, value, given))


@pytest.mark.parametrize("regime", GATES)
@pytest.mark.parametrize("keep", [False, True])
def test_an_avit_equals_its_definition(regime, keep):
    model, given = avit(regime, keep_class_token=keep), images()
    output = model(given)
    cotangent = torch.randn_like(output.logits)
    ours = gradients(model, objective_of(output, cotangent), given)
    found, means = literal.avit(model, given)
    logits, steps, rest = (torch.stack(parts) for parts in zip(*found, strict=True))
    assert torch.equal(output.halted.steps, steps)
    if keep:
        assert (steps[:, 0] == SIZES["depth"]).all()
    assert_equal(
        {"logits": output.logits, "remainders": output.halted.remainders, "d": output.halted.means},
        {"logits": logits, "remainders": rest, "d": means},
    )
    value = (logits * cotangent).sum() + 0.1 * (steps + rest).sum() + 3 * means.square().sum()
    assert_equal(ours, gradients(model, value, given))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", UNIVERSAL)
def test_leaving_equals_masking(kind, regime):
    model = uvit(regime, **UNIVERSAL[kind])
    leaves, masks = compare(model, model.padded(), images())
    rows = (4 * (5 - (model.config.pooling == "mean") + model.config.num_registers),)
    assert masks.halted.rows_per_step == rows * len(masks.halted.rows_per_step)
    assert len(leaves.halted.rows_per_step) == len(masks.halted.rows_per_step)
    if regime == "random" and kind != "rows stay":
        assert sum(leaves.halted.rows_per_step) < sum(masks.halted.rows_per_step)


@pytest.mark.parametrize("regime", GATES)
def test_tokens_that_leave_equal_tokens_that_are_masked(regime):
    model = avit(regime)
    leaves, _ = compare(model, model.padded(), images())
    assert (leaves.halted.rows_per_step == (20,)) == (regime == "first")


def test_images_of_many_sizes_leave_as_they_are_masked():
    for model in (avit(), uvit(), uvit(**UNIVERSAL["rows leave"])):
        sizes = [(16, 16), (8, 24), (8, 8)]
        given = [torch.randn(1, *size, dtype=torch.double) for size in sizes]
        one, two = model(given), model.padded()(given)
        assert torch.equal(one.halted.steps, two.halted.steps)
        assert_equal(
            {"logits": one.logits, "ponder": one.ponder},
            {"logits": two.logits, "ponder": two.ponder},
        )
        for index, image in enumerate(given):
            alone = model([image])
            assert_equal({"alone": alone.logits[0]}, {"alone": one.logits[index]})


def test_the_public_code_s_means():
    model, given = avit(), images()
    output, padded = model(given), model.padded(public_code=True)(given)
    assert torch.equal(output.halted.steps, padded.halted.steps)
    assert_equal({"logits": padded.logits}, {"logits": output.logits})
    cotangent = torch.randn(SIZES["depth"], dtype=torch.double)
    ours = gradients(model, (padded.halted.means * cotangent).sum(), given)
    means = literal.avit_means_of_the_public_code(model, given)
    assert_equal({"d": padded.halted.means}, {"d": means})
    assert_equal(ours, gradients(model, (means * cotangent).sum(), given))
    one = model.padded(public_code=True)(given[:1])
    assert one.halted.means is None and model.loss(one, torch.tensor([0])).isfinite()


def test_the_loss_of_an_avit():
    model, given = avit(distribution_weight=0.5, ponder_weight=0.25), images()
    output, labels = model(given), torch.tensor([0, 1, 2, 0])
    entropy = torch.nn.functional.cross_entropy(output.logits, labels)
    steps, means = output.halted.steps + output.halted.remainders, output.halted.means
    spread = ak.halting.distribution_loss(means, 0.75 * SIZES["depth"])
    whole = entropy + 0.25 * steps.mean() + 0.5 * spread
    torch.testing.assert_close(model.loss(output, labels), whole)
    none = dataclasses.replace(model.config, distribution_weight=0, ponder_weight=0)
    model.config = none
    torch.testing.assert_close(model.loss(output, labels), entropy)


@pytest.mark.parametrize("make", [uvit, avit, lambda: uvit(**UNIVERSAL["rows leave"])])
def test_poison_of_an_example_stays_there(make):
    model, clean = make(), images()
    given = clean.detach().clone()
    given[1] = torch.nan
    expected, output = model(clean), model(given)
    others = torch.tensor([0, 2, 3])
    assert_equal({"logits": output.logits[others]}, {"logits": expected.logits[others]})
    assert torch.equal(output.halted.steps[others], expected.halted.steps[others])
    assert output.logits[1].isnan().all()


def test_poison_in_rows_that_have_halted_is_not_seen():
    """In the model that masks; rows that have left are nowhere."""
    model = uvit("random")
    given = images()
    expected = model(given)
    halted = (expected.halted.steps == expected.halted.steps.min()).nonzero().flatten()
    step = int(expected.halted.steps.min())
    assert len(halted) < 4

    def poison(module, inputs, result):
        return result.index_fill(0, halted, torch.nan)

    model.encoder.layers[step].norm1.register_forward_hook(poison)
    assert_equal({"logits": model.padded()(given).logits}, {"logits": expected.logits})


@pytest.mark.parametrize("make", [uvit, avit, lambda: uvit(**UNIVERSAL["rows leave"])])
def test_a_batch_without_examples(make):
    model = make()
    for other in (model, model.padded()):
        output = other(torch.zeros(0, 1, 16, 16, dtype=torch.double))
        assert output.logits.shape == (0, 3) and output.ponder.shape == (0, 1)
        assert len(output.halted.steps) == 0


@pytest.mark.parametrize("make", [uvit, avit])
def test_layers_that_are_computed_once_more_in_the_backward_pass(make):
    model, given = make().train(), images()
    cotangent = torch.randn(4, 3, dtype=torch.double)
    plain = gradients(model, objective_of(model(given), cotangent), given)
    model.set_grad_checkpointing()
    assert_equal(gradients(model, objective_of(model(given), cotangent), given), plain)


def test_kept_branches_of_a_uvit_are_not_rescaled():
    """Of a rate near 1 what is kept would be large; SPEC 11 has no division."""
    model = uvit("never", stochastic_depth=0.5).train()
    assert all(layer.stochastic_depth == 0.5 for layer in model.encoder.layers)
    layer = model.encoder.layers[0]
    x = ak.ElasticBatch.from_padded(torch.randn(64, 2, 16, dtype=torch.double))
    kept = layer._dropped(x, x, 0.0).view(64, -1)
    whole = x.data.view(64, -1)
    is_kept = (kept == whole).all(1)
    assert is_kept.any() and ((kept == 0).all(1) | is_kept).all() and not is_kept.all()


def test_the_forms_of_sequences():
    config = models.UniversalTransformerConfig(**SIZES, seq_len=6, element_dim=2)
    model = randomised(models.UniversalTransformer(config))
    given = torch.randn(4, 6, 2, dtype=torch.double, requires_grad=True)
    compare(model, model.padded(), given)
    found = literal.universal(model, given)
    logits = torch.stack([each[0] for each in found])
    assert_equal({"logits": model(given).logits}, {"logits": logits})
    ragged = [torch.randn(n, 2, dtype=torch.double) for n in (6, 1, 3)]
    one, two = model(ragged), model.padded()(ragged)
    assert_equal({"logits": one.logits}, {"logits": two.logits})


@pytest.mark.parametrize("pooling", ["token", "mean", "max", "sum"])
def test_plain_models(pooling):
    options = {**SIZES, "pooling": pooling, "num_registers": 1}
    vit = randomised(models.ViT(models.ViTConfig(**options, **IMAGES)))
    transformer = randomised(models.Transformer(models.TransformerConfig(**options, seq_len=5)))
    for model, given in ((vit, images()), (transformer, torch.randn(4, 5, 3).double())):
        output, padded = model(given), model.padded()(given)
        assert output.ponder.shape == (4, 0) and output.halted is None and output.reads == ()
        assert_equal({"logits": output.logits}, {"logits": padded.logits})
    if pooling in ("token", "mean"):
        given = images()
        for image, logits in zip(given, vit(given).logits, strict=True):
            rows = vit.embed(image.unsqueeze(0))[0][0]
            for layer in vit.encoder.layers:
                rows = literal.block(layer, rows, torch.ones(len(rows), dtype=torch.bool))
            assert_equal({"logits": logits}, {"logits": literal.classify(vit, rows)})


@pytest.mark.parametrize("make", [uvit, avit, lambda: uvit(**UNIVERSAL["rows leave"])])
@pytest.mark.parametrize("static", [False, True])
def test_a_batch_with_unused_rows(make, static):
    """Rows rounded up to a multiple, and buffers that keep their sizes."""
    model = make()
    encoder = model.encoder
    x = model.embed_elastic(images()).tokens
    rule = dataclasses.replace(encoder.halting, static=static)
    expected, found = encoder(x), encoder(x.round_rows(8), halting=rule)
    rows = x.data.shape[0]
    assert torch.equal(found.state.updates[: len(expected.state.updates)], expected.state.updates)
    assert_equal({"y": found.batch.data[:rows]}, {"y": expected.batch.data})
    assert_equal(
        {"loss": ak.halting.ponder_loss(found.state)},
        {"loss": ak.halting.ponder_loss(expected.state)},
    )
    if static:
        assert set(found.state.rows_per_step) == {24}
