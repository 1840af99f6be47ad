"""The page of GPU times: floors by hand, tables that are those of the recorded rows."""

import re
from pathlib import Path

import pytest
from checks import refused

from adatape_kernels.benchmarks.audit.cards import CARDS, H200
from adatape_kernels.benchmarks.audit.work_counter import CountedWork
from adatape_kernels.benchmarks.reports import gpu_performance as page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/gpu-performance.md"
OPS = page.counted_ops(page.COUNTED)


def test_the_page_holds_what_the_recorded_rows_say():
    text = PAGE.read_text(encoding="utf-8")
    assert page.fill(text, page.COUNTED, page.RESULTS) == text


def test_a_floor_is_the_longer_of_memory_and_products():
    assert H200.floor(CountedWork(bytes=4.8e9, flops=1e9)) == pytest.approx(1e-3)
    assert H200.floor(CountedWork(bytes=1e6, flops=989e9)) == pytest.approx(1e-3)


def test_a_launch_costs_two_microseconds_more():
    work = CountedWork(bytes=1e9, flops=1e9, accessed=1e9)
    more = CountedWork(bytes=1e9, flops=1e9, accessed=1e9, launches=3)
    assert H200.predicted(more) - H200.predicted(work) == pytest.approx(6e-6)


def test_attention_s_counted_line_is_four_tensors_and_two_products():
    line = OPS["elastic_attention", "B=256, 207 rows, 6 heads of 64"]
    rows = 256 * 207 * 6
    assert line.needed.bytes == 4 * rows * 64 * 2
    assert line.needed.flops == 4 * rows * 207 * 64
    assert line.ours.launches == 1


@pytest.mark.parametrize("model", page.MODELS, ids=lambda model: model.name)
def test_a_model_needs_what_its_stages_need(model):
    stages = model.stages(OPS, "cublas")
    assert {stage.times for stage in stages} == {1, 12, 24}
    flops = sum(stage.times * stage.needed.flops for stage in stages)
    rows = 256 * ((224 // model.patch) ** 2 + 1 + model.num_tape_tokens)
    # Products of queries, keys, values and outputs alone, of all layers.
    assert flops > 12 * 8 * rows * model.dim**2
    table = page.model_table(model, OPS)
    sums = re.findall(r"([\d.]+) / ([\d.]+) ms", table)
    assert len(sums) == len(CARDS)
    assert all(0 < float(floor) <= float(predicted) for floor, predicted in sums)


def test_an_unknown_table_is_refused(capsys, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- gpu: other -->\n<!-- /gpu -->\n")
    assert page.main([str(path)]) == 2
    assert "gpu: expected one of ops, models, measured, got 'other'" in capsys.readouterr().err
    with refused("gpu", "ops, models, measured", "'other'"):
        page.fill(path.read_text(), page.COUNTED, page.RESULTS)


def test_the_page_names_the_form_of_dual_ffn_that_serves_on_each_card():
    small, base = page.MODELS
    forms = {card.name: (small.form(card), base.form(card)) for card in CARDS}
    on_hopper = ("epilogue", "cublas")
    assert forms == {
        **dict.fromkeys(("A100", "L4", "B200"), ("cublas", "cublas")),
        **dict.fromkeys(("H100", "H200"), on_hopper),
    }
    (row,) = re.findall(r"\| feed-forwards \|.*", page.model_table(small, OPS))
    assert re.findall(r"\((\w+)\)", row) == [forms[card.name][0] for card in CARDS]
