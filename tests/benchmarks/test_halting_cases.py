"""What the benchmark of halting models imposes, what it asks for, and the tables of its rows."""

from pathlib import PurePath

import pytest
import torch
from test_bench import TINY

from adatape_kernels.benchmarks import bench_cpu
from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.harness.cases import OURS
from adatape_kernels.benchmarks.ops import bench_halting
from adatape_kernels.benchmarks.ops.bench_halting import SparedLayers
from adatape_kernels.benchmarks.reports import result_tables
from adatape_kernels.ops.op import record
from adatape_kernels.recipes.measure import Timing

SHAPES = (TINY["halting"], "model=uvit V=Ti/56 B=5 halted=uniform")


def given(text, training=False):
    shape = bench_halting.SUITE.parse(text)
    torch.manual_seed(0)
    model = bench_halting.build(shape, torch.float32, "cpu")
    return bench_halting.inputs(model, shape, training)


@pytest.mark.parametrize("shape", SHAPES)
def test_units_run_as_many_layers_as_are_imposed(shape):
    case = given(shape)
    layers = (1 / case.imposed.imposed[:-1]).round().int()
    for model in (case.model, case.model.padded()):
        with torch.no_grad():
            halted = model(case.images).halted
        assert torch.equal(halted.steps.flatten(), layers)
    leaves, masks = (
        sum(model(case.images).halted.rows_per_step) for model in (case.model, case.model.padded())
    )
    assert bench_halting.computed_share(case) == pytest.approx(leaves / masks)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_models_own_halting_unit(shape):
    case = given(shape, training=True)
    assert all(grad.isfinite().all() for grad in bench_halting.elastic(case).run()[1:])
    if "uvit" in shape:
        output = case.model(case.images)
        weight = case.model.encoder.unit.own.projection.weight
        (grad,) = torch.autograd.grad(case.model.loss(output, case.labels), weight)
        assert grad.abs().sum() > 0


def test_a_masked_model_calls_no_op_of_ours():
    case = given(SHAPES[0], training=True)
    with record() as ran:
        bench_halting.masked(case).run()
    assert not list(ran)


@pytest.mark.parametrize("text", ["0", "25", "50", "75", "uniform"])
def test_layers_are_spared_by_percent(text):
    layers = SparedLayers(text).layers(9_000, 12)
    share = 0.5 + 0.5 / 12 if text == "uniform" else 1 - int(text) / 100
    assert layers.mean().item() / 12 == pytest.approx(share, abs=0.01)
    assert 1 <= layers.min() <= layers.max() <= 12


@pytest.mark.parametrize("text", ["91", "-1", "half", ""])
def test_other_shares_are_refused(text):
    with pytest.raises(ValueError):
        bench_halting.SUITE.parse(f"halted={text}")


def test_goals_follow_from_the_rows_that_are_computed():
    case = given(SHAPES[1])
    # 1 to 12 layers, 6.5 of them on average.
    assert bench_cpu.halting_goal(case, 0.9) == pytest.approx(0.9 * 12 / 6.5, rel=0.05)
    none = given(SHAPES[1].replace("uniform", "0"))
    assert bench_cpu.halting_goal(none, 0.9) == pytest.approx(1 / 1.05)


def test_a_table_of_every_peer():
    key = records.CaseKey("halting", "forward", "float32", "model=avit halted=50")
    times = {OURS: 0.001, "masked": 0.002, "x[mask]": 0.0015, "masked, compiled": None}
    rows = [
        records.row(
            key,
            name,
            "cpu",
            status="ok" if seconds else "failed",
            note="50.0 % of the rows" if name == OURS else "",
            timing=Timing(seconds, seconds, seconds) if seconds else None,
        )
        for name, seconds in times.items()
    ]
    tables = {"machine": result_tables.entries(rows)}
    old = "before\n<!-- peers: machine halting forward -->\nold\n<!-- /peers -->\nafter\n"
    new = result_tables.fill(old, tables, PurePath("results"))
    assert "| masked / ours | x[mask] / ours |" in new
    line = "| forward | float32 | model=avit halted=50 | 1 | 50.0 % of the rows | 2.00 | 1.50 |"
    assert line in new
    assert "old" not in new and "of the limit" not in new
    assert "[machine](results/machine.md)" in new
    assert result_tables.fill(new, tables, PurePath("results")) == new
    with pytest.raises(ValueError, match="table: expected words"):
        result_tables.fill(old.replace("forward", "backward"), tables, PurePath("results"))
