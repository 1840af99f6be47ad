"""Deep models, thresholds next to 1, units of users, empty batches and states of other rules."""

import dataclasses
import math

import pytest
import torch

import adatape_kernels as ak
from adatape_kernels.halting import Halting, distribution_loss
from adatape_kernels.layers import AViTEncoder, FeatureGate, UniversalEncoder

SIZES = {"image_size": 32, "dim": 16, "num_heads": 2, "ffn_dim": 24, "num_classes": 3}


def literal_loss(means, center):
    """The formula in Python's floats, where t · ln t of t = 0 is 0."""
    density = [math.exp(-((layer - center) ** 2) / 2) for layer in range(1, len(means) + 1)]
    scale = 0.98 / sum(density[: math.ceil(center) - 1])
    total = sum(means)
    terms = []
    for t, d in zip([scale * value for value in density], means, strict=True):
        q = min(max(d / total, 0.01), 0.99)
        terms.append(t * (math.log(t) - math.log(q)) if t > 0 else 0.0)
    return max(0.0, sum(terms) / len(terms))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layers, center", [(2, 2), (12, 9), (16, 16), (24, 18), (60, 45), (99, 2)])
def test_distribution_loss_of_any_depth_is_the_formula(layers, center, dtype):
    generator = torch.Generator().manual_seed(layers)
    means = torch.rand(layers, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    loss = distribution_loss(means, center)
    loss.backward()
    expected = literal_loss(means.tolist(), center)
    tolerance = max(1e-12, 4 * torch.finfo(dtype).eps)
    assert loss.dtype == dtype and abs(loss.item() - expected) <= tolerance * max(1, expected)
    assert means.grad.isfinite().all()


def test_a_deep_avit_has_a_loss():
    model = ak.models.create_model("avit_tiny_patch16_224", **SIZES, depth=24)
    loss = model.loss(model(torch.zeros(2, 3, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-7, 1e-8, 1e-12, 2.0**-53])
def test_a_threshold_next_to_one_is_exceeded_by_one(epsilon, dtype):
    rule = Halting.avit(threshold=1 - epsilon)
    batch = ak.ElasticBatch.from_padded(torch.ones(1, 3, 2, dtype=dtype))
    p = torch.tensor([1.0, 0.5, 1.0], dtype=dtype)
    state = rule.step(rule.start(batch), p, batch.data)
    assert state.output.data[:, 0].tolist() == [1.0, 0.5, 1.0]
    assert state.running.tolist() == [False, True, False]
    assert state.remainders.tolist() == [1.0, 0.0, 1.0]


def test_an_epsilon_that_no_threshold_can_hold_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"^act_epsilon: expected above 1.1e-16 and below 1"):
        ak.models.create_model("avit_tiny_patch16_224", **SIZES, act_epsilon=1e-20)


class Returns(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, state, data=None):
        return self.make(state.batch)


@pytest.mark.parametrize("name", ["uvit", "avit"])
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda b, n: torch.full((n,), 1.5), "probabilities: expected 0 to 1, got 1.5"),
        (lambda b, n: torch.full((n,), -0.5), "probabilities: expected 0 to 1, got -0.5"),
        (lambda b, n: torch.full((n,), math.nan), "probabilities: expected 0 to 1, got nan"),
        (lambda b, n: torch.full((n + 1,), 0.5), "probabilities: expected floating-point"),
        (lambda b, n: torch.full((n, 1), 0.5), "probabilities: expected floating-point"),
        (lambda b, n: torch.tensor(0.5), "probabilities: expected floating-point"),
        (lambda b, n: torch.ones(n, dtype=torch.long), "probabilities: expected floating-point"),
        (lambda b, n: None, "probabilities: expected a (t|T)ensor"),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_a_unit_of_the_users_own_is_checked(name, make, words, static):
    model = ak.models.create_model(f"{name}_tiny_patch16_224", **SIZES, depth=3)
    unit = Returns(lambda b: make(b, len(b.data) if name == "avit" else b.batch))
    setattr(model.encoder, "gate" if name == "avit" else "unit", unit)
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        model(torch.zeros(2, 3, 32, 32), static=static)


def test_what_has_halted_may_have_any_probability():
    rule = Halting.act(level="row", static=True)
    batch = ak.ElasticBatch.from_padded(torch.ones(1, 2, 3))
    state = rule.step(rule.start(batch), torch.tensor([1.0, 0.2]), batch.data)
    state = rule.step(state, torch.tensor([math.nan, 0.3]), state.batch.data)
    assert state.score.tolist() == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("name", ["uvit", "u2t", "avit"])
def test_an_empty_batch_is_charged_nothing(name):
    model = ak.models.create_model(f"{name}_tiny_patch16_224", **SIZES, depth=3)
    output = model(torch.zeros(0, 3, 32, 32))
    charge = model.charge(output)
    # The distribution loss of an A-ViT is that of layers in which nothing halts.
    assert charge.isfinite() if name == "avit" else charge.item() == 0


RULES = {
    "example": Halting.act(),
    "masked": Halting.act(masked=True),
    "static": Halting.act(static=True),
    "row": Halting.act(level="row"),
    "row leaves": Halting.act(level="row", leave="row"),
    "row masked": Halting.act(level="row", masked=True),
}


@pytest.mark.parametrize("began", RULES)
@pytest.mark.parametrize("goes_on", RULES)
def test_a_state_belongs_to_rules_of_its_own_mode(began, goes_on):
    batch = ak.ElasticBatch.from_padded(torch.ones(2, 3, 4))
    state = RULES[began].start(batch)
    p = torch.full((2 if "row" not in goes_on else 6,), 0.5)
    if began == goes_on:
        RULES[goes_on].step(state, p, batch.data)
        return
    with pytest.raises(ValueError, match=r"^state: expected one "):
        RULES[goes_on].step(state, p, batch.data)


def test_rules_of_a_call_are_checked():
    layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(2)]
    x = ak.ElasticBatch.from_padded(torch.randn(2, 4, 8))
    avit = AViTEncoder(layers, 8, FeatureGate(1.0, 0.0))
    universal = UniversalEncoder(layers, 8, 3, Halting.act(level="row", leave="row"))
    with pytest.raises(ValueError, match=r"^halting: expected a rule by which rows halt"):
        avit(x, halting=Halting.act())
    for encoder in (avit, universal):
        with pytest.raises(TypeError, match=r"^halting: expected"):
            encoder(x, halting=3)
        masked = dataclasses.replace(encoder.halting, masked=True)
        with pytest.raises(ValueError, match=r"^apply: expected one that hides halted rows"):
            encoder(x, halting=masked)


@pytest.mark.parametrize("name", ["vit", "uvit", "avit"])
def test_a_model_without_its_head_is_not_saved(name, tmp_path):
    model = ak.models.create_model(f"{name}_tiny_patch16_224", **SIZES, depth=1)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match=r"^model: expected one with its head"):
        ak.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_function_that_takes_other_steps_is_told_their_numbers():
    taken = iter([0, 5, 5, 5, 5, 5])

    def function():
        rule = Halting.act()
        state = rule.start(ak.ElasticBatch.from_padded(torch.ones(1, 2, 3)))
        for _ in range(next(taken)):
            state = rule.step(state, torch.tensor([0.1]), state.batch.data)

    with pytest.raises(ValueError, match=r"got 0 and 5$"):
        ak.halting.report(function)
