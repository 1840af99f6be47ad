"""Loops of halting steps against the literal ones: outputs, steps, remainders and gradients."""

import dataclasses

import pytest
import torch
from checks import assert_close, assert_same_bits, refused
from literal_halting import literal_act, literal_rows_that_leave

from adatape_kernels import ElasticBatch
from adatape_kernels.halting import Halting, distribution_loss, ponder_loss, report

OP = "accumulate_rows"
LENS, DIM, STEPS = (3, 1, 5, 0, 4), 6, 5


class Loop:
    """Blocks that mix the rows of each example, and a halting unit, on float64 parameters."""

    def __init__(self, device, spread=3.0, dtype=torch.float64):
        made = torch.Generator().manual_seed(7)

        def values(*shape):
            return torch.randn(*shape, generator=made, dtype=torch.float64).to(device, dtype)

        self.mixes = [values(DIM, DIM).div(DIM**0.5).requires_grad_() for _ in range(STEPS)]
        self.unit = values(DIM).mul(spread).requires_grad_()
        self.lens = torch.tensor(LENS)
        self.data = values(sum(LENS), DIM).requires_grad_()
        self.cotangent = values(sum(LENS), DIM)

    def leaves(self):
        return [self.data, self.unit, *self.mixes]

    def probabilities(self, x):
        return torch.sigmoid(x @ self.unit - 0.3)

    def blocks(self):
        """One example's rows (rows, dim) to the same."""
        return [lambda x, m=m: torch.tanh(x @ m + x.mean(0)) for m in self.mixes]

    def block(self, n, batch, visible=None):
        """The same block on a batch; of each example the visible rows are averaged."""
        example = batch.example_of_rows()
        seen = torch.ones_like(example) if visible is None else visible
        seen = (seen.bool() & (example < batch.batch)).to(batch.dtype)
        zeros = batch.data.new_zeros(batch.batch + 1, DIM)
        hidden = batch.data.where(seen.unsqueeze(1) > 0, 0)
        mean = zeros.index_add(0, example, hidden)
        number = seen.new_zeros(batch.batch + 1).index_add(0, example, seen).clamp(min=1)
        return torch.tanh(batch.data @ self.mixes[n] + (mean / number.unsqueeze(1))[example])

    def run(self, rule, batch, before=True):
        state, p = rule.start(batch), None
        for n in range(STEPS):
            if state.done:
                break
            if before:
                p = self._of_units(state, state.batch.data)
            visible = state.rows_that_run if rule.masked and rule.leave == "row" else None
            data = self.block(n, state.batch, visible)
            if not before:
                p = self._of_units(state, data)
            state = rule.step(state, p, data, last=n == STEPS - 1)
        return state

    def _of_units(self, state, data):
        p = self.probabilities(data)
        batch = state.batch
        return p if state.of_rows else batch.with_data(p.unsqueeze(1)).pool("mean").squeeze(1)

    def gradients(self, y, cost):
        objective = (y * self.cotangent).sum() + 0.3 * cost.sum()
        return torch.autograd.grad(objective, self.leaves(), allow_unused=True)

    def literal(self, rule, before=True):
        parts = []
        for x in self.data.split(LENS):
            if rule.leave == "row":
                parts.append(
                    literal_rows_that_leave(
                        self.blocks(),
                        self.probabilities,
                        x,
                        rule.threshold,
                        rule.update,
                        rule.force_halt,
                        before,
                        rule.weighs_at_threshold,
                    )
                )
            elif len(x) == 0:
                # Nothing runs in an example without rows.
                parts.append((x, [0], [0.0], 0) if rule.level == "example" else (x, [], [], 0))
            else:
                parts.append(
                    literal_act(
                        self.blocks(),
                        self.probabilities,
                        x,
                        rule.threshold,
                        rule.update,
                        rule.level,
                        rule.force_halt,
                    )
                )
        y = torch.cat([part[0] for part in parts])
        steps = [n for part in parts for n in part[1]]
        remainders = torch.stack(
            [torch.as_tensor(r, dtype=y.dtype, device=y.device) for part in parts for r in part[2]]
        )
        return y, steps, remainders, sum(part[3] for part in parts)


RULES = {
    "act": Halting.act(threshold=0.4),
    "act accumulated": Halting.act(threshold=0.6, update="accumulated", force_halt=True),
    "act rows in sight": Halting.act(threshold=0.9, level="row"),
    "act rows leave": Halting.act(threshold=0.9, level="row", leave="row"),
    "a-vit": Halting.avit(threshold=0.9),
}


def batch_of(loop):
    offsets = torch.tensor([0, *LENS]).cumsum(0).to(loop.data.device)
    return ElasticBatch.from_packed(loop.data, offsets)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize(
    "mode", ["leave", pytest.param("masked", marks=pytest.mark.runs_no_op), "static"]
)
@pytest.mark.parametrize("name", RULES)
def test_loops_do_what_the_definition_says(device, name, mode, dtype):
    loop, before = Loop(device), name != "a-vit"
    rule = dataclasses.replace(RULES[name], masked=mode == "masked", static=mode == "static")
    batch = batch_of(loop)
    state = loop.run(rule, batch.round_rows(8) if mode == "static" else batch, before)
    y, steps, remainders, computed = loop.literal(rule, before)
    rows = sum(LENS)
    units = rows if rule.level == "row" else len(LENS)
    assert state.updates.tolist()[:units] == steps
    assert len(set(steps)) > 2  # some halt early, some late, some never
    assert_close(state.output.data[:rows], y, 1e-12)
    assert_close(state.remainders[:units], remainders, 1e-12)
    assert not state.running[units:].any()
    if mode == "leave":
        assert sum(state.rows_per_step) == computed
    else:
        assert set(state.rows_per_step) == {state.initial.data.shape[0]}
    actual = loop.gradients(state.output.data[:rows], state.remainders)
    expected = loop.gradients(y, remainders)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None) or (mine if theirs is None else theirs).eq(
            0
        ).all()
        if mine is not None and theirs is not None:
            assert_close(mine, theirs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("when", ["at once", "never", "one by one"])
def test_halting_at_imposed_times(device, when, dtype):
    """Probabilities of 1 and 0 make each example halt in a step of our choice."""
    times = {"at once": [0, 0, 0], "never": [9, 9, 9], "one by one": [2, 0, 1]}[when]
    batch = ElasticBatch.from_padded(torch.randn(3, 4, DIM, device=device))
    rule, states = Halting.act(update="accumulated"), []
    state = rule.start(batch)
    for n in range(4):
        if state.done:
            break
        p = torch.tensor([float(time <= n) for time in times], device=device)[state.examples]
        states.append(state.rows_per_step)
        state = rule.step(state, p, state.batch.data + 1)
    ran = [min(time + 1, 4) for time in times]
    assert state.updates.tolist() == ran
    assert state.rows_per_step == tuple(4 * sum(r > n for r in ran) for n in range(max(ran)))
    halted = torch.tensor([float(time < 4) for time in times], device=device)
    number = torch.tensor([[[time + 1.0]] for time in times], device=device)
    expected = (batch.to_padded()[0] + number) * halted.view(3, 1, 1)
    assert_close(state.output.to_padded()[0], expected, 1e-6)
    assert_same_bits(state.remainders, halted)
    assert state.done == (when != "never")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_halted_never_shows(device, dtype):
    """NaN in the states of rows that stay beyond their halting, and no other example's bits."""
    rule = Halting.act(level="row", threshold=0.5)
    batch = ElasticBatch.from_padded(torch.randn(2, 3, DIM, device=device).to(dtype))
    p = torch.tensor([1.0, 0.2, 0.2, 1.0, 1.0, 1.0], device=device)
    state = rule.step(rule.start(batch), p, batch.data)
    assert state.batch.lens.tolist() == [3]  # the second example has gone as a whole
    data = state.batch.data.clone()
    data[0] = torch.nan
    after = rule.step(state, torch.ones(3, device=device), data)
    expected = batch.data.clone()
    basic = torch.tensor([0.8], device=device) * batch.data[1:3].float()
    basic = basic + torch.tensor([0.2], device=device) * (0.2 * batch.data[1:3].float())
    expected[1:3] = basic.to(dtype)
    assert_close(after.output.data, expected, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert_same_bits(after.output.data[3:], batch.data[3:])
    assert after.done and after.batch.batch == 0


@pytest.mark.parametrize("dtype", [torch.float32])
def test_an_example_alone_gives_the_same_bits(device, dtype):
    batch = ElasticBatch.from_padded(torch.randn(4, 5, DIM, device=device))
    rule = Halting.act(level="row", leave="row", threshold=0.8)

    def run(x):
        state = rule.start(x)
        while not state.done and len(state.rows_per_step) < 5:
            state = rule.step(state, state.batch.data[:, 0].sigmoid(), state.batch.data * 0.75)
        return state

    together = run(batch)
    for i in range(4):
        alone = run(batch[i : i + 1])
        assert_same_bits(alone.output.data, together.output[i].inputs)
        assert_same_bits(alone.remainders, together.remainders[5 * i : 5 * i + 5])


@pytest.mark.no_backend
def test_equality_with_the_threshold():
    """SPEC 11, quirk 3, and SPEC 12, quirk 3: h = θ exactly leaves without a remainder."""
    batch = ElasticBatch.from_padded(torch.ones(1, 1, 2))
    for rule, weight in ((Halting.act(threshold=0.5), 0.5), (Halting.avit(threshold=0.5), 0.0)):
        state = rule.step(rule.start(batch), torch.tensor([0.5]), batch.data)
        assert state.done and state.remainders.tolist() == [0.0] and state.updates.tolist() == [1]
        assert state.output.data.tolist() == [[weight, weight]]


@pytest.mark.no_backend
def test_an_empty_batch_is_done_at_once():
    for batch in (
        ElasticBatch.from_padded(torch.ones(0, 3, 2)),
        ElasticBatch.from_padded(torch.ones(2, 0, 2)),
    ):
        for rule in RULES.values():
            state = rule.start(batch)
            assert state.done and state.output.data.shape == (0, 2)
            assert ponder_loss(state).item() == 0


@pytest.mark.runs_no_op
def test_bad_input_is_refused():
    for threshold in (0, 1, -0.5, float("nan")):
        with refused("threshold", "0", str(threshold)):
            Halting(threshold=threshold)
    with refused("level", "example or row", "token"):
        Halting.act(level="token")
    with refused("update", "basic or accumulated", "mean"):
        Halting.act(update="mean")
    with refused("leave", "example", "row"):
        Halting.act(level="example", leave="row")
    with refused("static", "False", "True"):
        Halting.act(static=True, masked=True)
    with refused("masked", "True or False", "1", error=TypeError):
        Halting.avit(masked=1)
    rule, batch = Halting.act(), ElasticBatch.from_padded(torch.ones(2, 3, 4))
    with refused("batch", "ElasticBatch", "float32", error=TypeError):
        rule.start(batch.data)
    state = rule.start(batch)
    good = torch.full((2,), 0.5)
    with refused("probabilities", "(2,)", "(6,)"):
        rule.step(state, torch.ones(6), batch.data)
    with refused("probabilities", "floating", "int64"):
        rule.step(state, good.long(), batch.data)
    for value in (-0.1, 1.5, float("nan")):
        with refused("probabilities", "0 to 1", "nan" if value != value else str(value)[:3]):
            rule.step(state, torch.tensor([0.5, value]), batch.data)
    with refused("data", "(6, 4)", "(5, 4)"):
        rule.step(state, good, batch.data[:5])
    with refused("data", "float32", "float64"):
        rule.step(state, good, batch.data.double())
    done = rule.step(state, torch.ones(2), batch.data)
    with refused("state", "runs", "done"):
        rule.step(done, torch.ones(0), done.batch.data)
    with refused("means", "(layers,)", "(2, 3)"):
        distribution_loss(torch.ones(2, 3), 2)
    with refused("center", "1", "9"):
        distribution_loss(torch.ones(4), 9)
    with refused("function", "called", "3", error=TypeError):
        report(3)


@pytest.mark.no_backend
def test_distribution_loss_of_twelve_layers():
    """SPEC 12: z is about 3.261, t sums to 3.26, and a uniform d gives Σ t (ln t + ln 12) / 12."""
    means = torch.full((12,), 0.3, dtype=torch.float64, requires_grad=True)
    layers = torch.arange(1, 13, dtype=torch.float64)
    density = torch.exp(-((layers - 9) ** 2) / 2) / (2 * torch.pi) ** 0.5
    target = 0.98 / density[:8].sum() * density
    assert abs(float(0.98 / density[:8].sum()) - 3.261) < 1e-3
    expected = (target * (target.log() + torch.tensor(12.0).double().log())).sum() / 12
    loss = distribution_loss(means, 9)
    assert_close(loss, expected, 1e-12)
    (gradient,) = torch.autograd.grad(loss, means)
    assert gradient[8] < 0 < gradient[0]  # more halting in layer 9, less in the first


@pytest.mark.no_backend
def test_report_counts_what_ran():
    def model(x):
        rule = Halting.act()
        state = rule.start(ElasticBatch.from_padded(x))
        for p in ([0.5, 1.0, 0.0], [1.0, 0.5], [1.0]):
            state = rule.step(state, torch.tensor(p), state.batch.data @ x.new_ones(4, 4))

    # A product by 16 weights, and y ← w·s + (1 − w)·y in 3 operations on each of 4 features.
    found = report(model, torch.ones(3, 5, 4), repeats=2)
    assert [(s.step, s.examples, s.rows, s.flops) for s in found.steps] == [
        (1, 3, 15, 15 * (2 * 16 + 3 * 4)),
        (2, 2, 10, 10 * (2 * 16 + 3 * 4)),
        (3, 1, 5, 5 * (2 * 16 + 3 * 4)),
    ]
    assert all(s.milliseconds > 0 for s in found.steps)
    assert found.rows == 45 and found.share == 30 / 45
    assert str(found).splitlines()[-1] == "66.7 % of 45 rows were computed"
