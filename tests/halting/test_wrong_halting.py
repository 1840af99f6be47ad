"""What `ak.halting` and the models that halt refuse, each in one line, with nothing lost."""

import pytest
import torch
from checks import assert_same_bits, refused

import adatape_kernels as ak
from adatape_kernels import ElasticBatch, models
from adatape_kernels.halting import Halting

pytestmark = pytest.mark.no_backend
RULES = {
    "act": Halting.act,
    "avit": Halting.avit,
    "act, static": lambda: Halting.act(static=True),
    "avit, static": lambda: Halting.avit(static=True),
    "masked": lambda: Halting.act(masked=True),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_that_is_refused_leaves_the_state_as_it_was(name):
    rule = RULES[name]()
    # As many rows as examples, so that probabilities of either fit.
    batch = ElasticBatch.from_padded(torch.randn(3, 1, 4))
    state = rule.step(rule.start(batch), torch.tensor([0.5, 0.25, 0.5]), batch.data + 1)
    before = state.total.clone(), state.score.clone(), state.batch.data.clone()
    good, data = torch.full((3,), 0.25), state.batch.data
    for value in (float("nan"), float("inf"), -0.001, 1.001):
        with refused("probabilities", "0 to 1", str(value)[:3]):
            rule.step(state, torch.tensor([0.5, value, 0.5]), data)
    for wrong in (good[:2], good.unsqueeze(1), good.bool(), good.long(), good + 0j):
        with refused("probabilities", "floating-point (3,)"):
            rule.step(state, wrong, data)
    for wrong in (good.tolist(), None, 0.5):
        with refused("probabilities", "a tensor", error=TypeError):
            rule.step(state, wrong, data)
    with refused("probabilities", "on cpu", "meta"):
        rule.step(state, good.to("meta"), data)
    for wrong in (data[:2], data.double(), data[0], data.unsqueeze(0)):
        with refused("data", "(3, 4)"):
            rule.step(state, good, wrong)
    with refused("data", "on cpu", "meta"):
        rule.step(state, good, data.to("meta"))
    other = Halting.avit() if rule.level == "example" else Halting.act()
    with refused("state", f"a rule for {other.level}s", f"for {rule.level}s"):
        other.step(state, good, data)
    with refused("state", "HaltingState", error=TypeError):
        rule.step(batch, good, data)
    for now, then in zip((state.total, state.score, state.batch.data), before, strict=True):
        assert_same_bits(now, then)
    assert rule.step(state, good, data).updates.tolist() == [2, 2, 2]


def test_thresholds():
    for threshold in (0, 1, -1, 2, 1.5, float("nan"), float("inf"), 1 - 1e-17):
        with refused("threshold", "0", "1", str(threshold)):
            Halting.avit(threshold=threshold)
    for threshold in ("0.5", None, True, [0.5], torch.ones(2)):
        with refused("threshold", "a number", error=TypeError):
            Halting.act(threshold=threshold)
    for threshold in (torch.tensor(0.5), torch.tensor(0.5).numpy()):
        rule = Halting.act(threshold=threshold)
        assert type(rule.threshold) is float and rule == Halting.act(threshold=0.5)
    for epsilon in (0, 1, -0.5, 1.5, float("nan")):
        for name in ("uvit_tiny_patch16_224", "avit_tiny_patch16_224"):
            with refused("act_epsilon", str(epsilon)):
                models.create_model(name, act_epsilon=epsilon)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_in_which_everything_left(name):
    rule = RULES[name]()
    batch = ElasticBatch.from_padded(torch.randn(2, 3, 4))
    ones = torch.ones(6 if rule.level == "row" else 2)
    state = rule.step(rule.start(batch), ones, batch.data)
    assert not state.running.any() and torch.equal(state.output.data, batch.data)
    if not rule.static:
        with refused("state", "something runs", "done"):
            rule.step(state, ones[:0], state.batch.data)
        if not rule.masked:
            assert state.batch.data.shape == (0, 4)
            assert state.batch.pool("mean").shape[1] == 4
            again, source = state.batch.keep(torch.zeros(0, dtype=torch.bool))
            assert again.data.shape == (0, 4) and len(source) == 0
    else:
        after = rule.step(state, ones, state.batch.data)  # nobody looks whether anything runs
        assert torch.equal(after.output.data, batch.data) and torch.equal(after.score, state.score)


@pytest.mark.parametrize("name", ["uvit_tiny_patch16_224", "avit_tiny_patch16_224"])
def test_models(name):
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 16, "num_classes": 3}
    model = models.create_model(name, image_size=32, **sizes)
    for wrong in (None, 3, torch.zeros(2, 3)):
        with refused("output", "AdaTapeOutput", error=TypeError):
            model.charge(wrong)
    assert len(model(torch.zeros(0, 3, 32, 32))) == 0
    assert len(ak.models.PaddedClassifier(model)([])) == 0
    with refused("inputs", "float32", "float64"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
