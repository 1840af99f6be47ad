"""How `compare` chooses epochs, images and rounds, and how it reads and writes times."""

import math

import pytest

from adatape_kernels.recipes.compare import compare_plan
from adatape_kernels.recipes.compare.compare_config import (
    MODELS,
    CompareConfig,
    seconds_of,
    time_text,
)
from adatape_kernels.recipes.compare.compare_plan import (
    RunCost,
    amount_text,
    makespan,
    planned,
    time_split_text,
)


def plan_of(budget, *, train=1e-3, test=1e-4, images=6000, jobs=2, spent=10.0, **options):
    config = CompareConfig(models=("vit", "avit"), sizes=(2, 4), budget=budget, **options)
    costs = {(run.model, run.size): RunCost(train * run.size, test) for run in config.runs()}
    facts = dict(images=images, test_images=1000, jobs=jobs, loading=0.0, spent=spent)
    return config, planned(config, costs, **facts)


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2h", 7200), ("1.5m", 90), ("1h0m1s", 3601)],
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["20", "-3m", "", " ", "m", "0m", "0s", "3m1h", "1d", "nanm", "infs", "1e3s", "2 0m"]
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r"^budget: expected a time such as 90s, 20m or 1h30m"):
        seconds_of(text)


def test_times_are_written():
    found = [time_text(s) for s in (0.2, 45, 59.6, 200, 3599.7, 3900, 90_000)]
    assert found == ["0s", "45s", "1m00s", "3m20s", "1h00m", "1h05m", "25h00m"]


def test_the_longest_tasks_go_first():
    assert makespan([1, 1, 2], 2) == 2 and makespan([3, 3, 2, 2, 2], 2) == 7
    assert makespan([5], 4) == 5


@pytest.mark.parametrize("budget", [60, 90, 150, 280, 600, 3600, 86_400])
def test_what_is_foreseen_is_near_the_budget(budget):
    config, plan = plan_of(budget)
    # Two seeds of 2 · (2 + 4) ms an image, on two cores.
    assert plan.training_seconds == pytest.approx(plan.epochs * plan.images * 12e-3)
    foreseen = 10 + plan.training_seconds + plan.measuring_seconds
    assert 0.8 * budget <= foreseen <= budget
    assert plan.images <= 6000 and plan.epochs >= 1 and 3 <= plan.rounds <= config.rounds
    text = f"{amount_text(config, plan, 6000)} {time_split_text(plan, 10.0)}"
    assert f"{plan.epochs:,} epoch" in text and f"about {time_text(foreseen)} in all" in text
    assert ("are left out" in text) == (plan.images < 6000)


def test_whole_epochs_that_nearly_fit_leave_no_image_out():
    plans = [plan_of(budget)[1] for budget in range(60, 500, 3)]
    whole = [plan for plan in plans if plan.images == 6000]
    shares = [plan.epochs / plan.fitting_epochs for plan in whole]
    assert 0.85 <= min(shares) < 0.87 and 1.02 < max(shares) <= 1.04
    parts = [plan for plan in plans if plan.images < 6000]
    assert all(plan.images < 0.97 * 6000 for plan in parts) and parts
    for plan in parts:
        assert plan.epochs * plan.images / 6000 == pytest.approx(plan.fitting_epochs, rel=1e-3)


def test_a_budget_that_no_training_fits_into_says_what_is_enough():
    with pytest.raises(ValueError, match=r"^budget: expected 1[0-9]s or more for 8 runs.*, got 3s"):
        plan_of(3)
    # 10 s have passed, a round takes 0.8 s, counting 1.2 s, and 100 images 1.2 s.
    _, plan = plan_of(19)
    assert (plan.epochs, plan.rounds) == (1, 3) and 100 <= plan.images < 6000
    _, plan = plan_of(15)
    assert (plan.epochs, plan.rounds) == (1, 1) and 100 <= plan.images < 200


def test_epochs_that_are_given_are_kept():
    config = CompareConfig(models=("vit",), sizes=(2,), seeds=(0,), epochs=7)
    costs = {("vit", 2): RunCost(1e-3, 1e-4)}
    plan = planned(config, costs, images=500, test_images=100, jobs=2, loading=1e-3, spent=1.0)
    assert (plan.epochs, plan.images, plan.rounds, plan.fitting_epochs) == (7, 500, 5, None)
    assert plan.training_seconds == pytest.approx(3.5)
    counting = compare_plan.COUNTING_PASSES
    assert plan.measuring_seconds == pytest.approx((5 + counting) * 0.11 + 0.1)
    assert "7 epochs of 500 images (10 steps of 50 each)" in amount_text(config, plan, 500)


def test_each_model_is_that_of_train_in_its_best_form():
    config = CompareConfig(sizes=(1, 3), seeds=(5,), epochs=1, options={"bank_patch": 7})
    for run in config.runs():
        made = config.train_config(run, 1, None)
        vit = made.vit_config(10, 1)
        assert vit.depth == run.size and made.seed == 5 and made.split == 0
        assert (vit.dim, vit.num_heads, vit.patch_size, vit.num_patches) == (96, 3, 7, 16)
        if made.reads:
            assert (vit.bank, vit.bank_patch_size) == (run.model.removeprefix("adatape-"), 7)
        if run.model == "u2t":
            assert vit.num_layers == min(2, run.size)
        if run.model == "uvit":
            assert vit.num_layers == run.size and vit.act_type == "basic"
        if run.model == "avit":
            assert vit.gate_center == 4.0  # a gate that new parameters can open
    assert [run.model for run in config.runs()][::2] == [*MODELS]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sizes": (0,)}, "sizes: expected 1 to"),
        ({"sizes": ()}, "sizes: expected one or more"),
        ({"models": ("vits",)}, "models: expected some of adatape-input"),
        ({"models": "vit"}, "models: expected names"),
        ({"rounds": 0}, "rounds: expected 1 to"),
        ({"epochs": 0}, "epochs: expected 1 to"),
        ({"epochs": None}, "budget: expected a budget or a number of epochs, got neither"),
        ({"budget": 20.0}, "budget: expected a budget or a number of epochs, got both"),
        ({"epochs": None, "budget": math.inf}, "budget: expected up to 30 days"),
        ({"limit": 0}, "limit: expected 1"),
        ({"data": "fashion"}, "data: expected one of"),
        ({"options": {"depth": 3}}, "options: expected image_size"),
        ({"options": {"dim": 7}}, "dim"),
    ],
)
def test_values_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        CompareConfig(**{"epochs": 1, **options})
