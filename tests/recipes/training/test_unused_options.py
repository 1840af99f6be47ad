"""Options that change nothing beside the others are refused, by every command that takes them."""

from dataclasses import asdict

import pytest
from checks import refused

from adatape_kernels.cli import main
from adatape_kernels.recipes.compare.compare_config import CompareConfig
from adatape_kernels.recipes.finetune.finetune_plan import FinetunePlan
from adatape_kernels.recipes.parity.parity_config import ParityConfig
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_defaults import DEFAULTS
from adatape_kernels.recipes.training.unused_options import check_loading_used

NO_TAPE = {"num_tape_tokens": 0}
UNUSED = [
    (NO_TAPE, {"halt_threshold_range": (0.5, 3.0)}),
    (NO_TAPE, {"halt_threshold": 1.5}),
    (NO_TAPE, {"topk": 2}),
    (NO_TAPE, {"bank": "learn"}),
    (NO_TAPE, {"bank_patch": 2}),
    (NO_TAPE, {"ponder_weight": 0.1}),
    ({"bank": "input"}, {"bank_size": 30}),
    ({"bank": "learn"}, {"bank_patch": 2}),
    ({"randaugment": 0}, {"randaugment_magnitude": 3}),
    ({"unreadable": "stop"}, {"unreadable_limit": 3}),
]


@pytest.mark.parametrize(("beside", "option"), UNUSED)
def test_an_option_without_effect_is_refused(beside, option):
    (name,) = option
    with refused(name.replace("_", "-")):
        TrainConfig.of({"data": "digits", **beside, **option})


@pytest.mark.parametrize(("beside", "option"), UNUSED)
def test_a_saved_run_and_a_whole_configuration_keep_it(beside, option):
    config = TrainConfig.of({"data": "digits", **beside})
    assert TrainConfig.of(asdict(config)) == config
    saved = {**asdict(config), **option}
    if config.num_tape_tokens == 0 and option == {"halt_threshold": 1.5}:
        saved["halt_threshold"] = 1
    (name,) = option
    assert getattr(TrainConfig.of_saved(saved), name) == saved[name]


def test_an_option_with_its_default_is_not_refused():
    for beside, option in UNUSED:
        (name,) = option
        if name in DEFAULTS:
            TrainConfig.of({"data": "digits", **beside, name: DEFAULTS[name]})


def test_patches_of_a_bank_that_are_not_there_may_have_to_divide_an_image():
    sizes = {"data": "imagefolder", "image_size": 50, "patch": 5}
    assert TrainConfig.of({**sizes, "bank": "learn", "bank_patch": 10}).bank_patch == 10


@pytest.mark.parametrize("kind", ["plain", "input", "learn"])
def test_what_one_kind_of_finetune_has_no_use_for_is_left_out_of_its_runs(kind):
    options = {"data": "digits", "topk": 2, "bank_size": 30, "bank_patch": 2, "ponder_weight": 0.1}
    options |= {"halt_threshold_range": (0.5, 3.0)}
    plan = FinetunePlan(options, None, None, None, 2)
    plan.check()
    made = TrainConfig.of(plan.kind_options(kind, 0))
    assert made.topk == (4 if kind == "plain" else 2)
    assert made.bank_size == (30 if kind == "learn" else DEFAULTS["bank_size"])
    assert made.bank_patch == (2 if kind == "input" else 1)
    assert (made.halt_threshold_range is None) == (kind == "plain")


def test_compare_takes_what_one_of_its_models_has_use_for():
    def made(**given):
        return CompareConfig(data="digits", epochs=1, **given)

    both = made(models=("adatape-learn", "adatape-input", "vit"), options={"bank_patch": 2})
    patches = [both.train_config(run, 1, None).bank_patch for run in both.runs()]
    assert patches == 6 * [2] + 6 * [2] + 6 * [1]
    for models in (("vit", "avit"), ("adatape-learn",)):
        with refused("bank-patch"):
            made(models=models, options={"bank_patch": 2})
    with refused("unreadable-limit"):
        made(options={"unreadable_limit": 3})
    with refused("look"):
        made().loading({"look": "none"})


def test_parity_without_an_adatape_has_no_sequence_token():
    with refused("sequence-token"):
        ParityConfig(models=("transformer",), sequence_token=True)
    assert ParityConfig(models=("adatape-fixed-query",), sequence_token=True).sequence_token


def test_images_in_memory_are_looked_at():
    for look in (None, "all"):
        check_loading_used({"look": look}, "digits")
    check_loading_used({"look": "none"}, "shards")
    with refused("look"):
        check_loading_used({"look": "none"}, "digits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--look", "none"], "look: expected all for digits"),
        (["--num-tape-tokens", "0", "--halt-threshold-range", "0.5,3"], "halt-threshold-range: "),
    ],
)
def test_train_says_so_in_one_line_and_begins_nothing(tmp_path, capsys, words, said):
    pytest.importorskip("matplotlib", reason="a run asks for it before it begins")
    assert main(["train", "--data", "digits", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"adatape-kernels: {said}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
