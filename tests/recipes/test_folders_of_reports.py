"""Reports go into no other command's folder, and what a folder holds is a run's own or refused."""

import json

import pytest
import torch

from adatape_kernels.models.model_file import save
from adatape_kernels.recipes.adatape_runs import check_report_folder
from adatape_kernels.recipes.budget import budget
from adatape_kernels.recipes.compare import compare_folder
from adatape_kernels.recipes.compare.compare_config import CompareConfig
from adatape_kernels.recipes.parity import parity_table
from adatape_kernels.recipes.parity.parity_config import ParityConfig
from adatape_kernels.recipes.parity.parity_models import new_model
from adatape_kernels.recipes.parity.parity_training import ParityResult

CONFIG = ParityConfig(lengths=(4,), models=("adatape",), seeds=(0,), steps=3, eval_examples=20)


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.json", "report.json"])
def test_a_report_takes_the_place_of_no_other(tmp_path, file):
    check_report_folder(tmp_path / "missing", ("results", "own"))
    (tmp_path / file).write_text('{"results": [], "pareto_front": {}}')
    with pytest.raises(ValueError, match=r"^out: expected a folder .*, got .*"):
        check_report_folder(tmp_path, ("results", "own"))


@pytest.mark.parametrize("content", ['{"results": [], "own": {}, "beside": []}', '{"res', ""])
def test_an_own_report_and_a_broken_one_are_replaced(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    check_report_folder(tmp_path, ("results", "own"))


def saved(folder, accuracy=0.5, model="adatape", length=4):
    result = ParityResult("adatape", 4, 0, accuracy, 0.5, 1.0, 9, 3, 2.0, ((3, 0.7, 0.5),))
    entries = {"training": CONFIG.training(4), "result": result.entries()}
    (folder / "adatape-4-0.json").write_text(json.dumps(entries))
    save(new_model(model, length), folder / "adatape-4-0.safetensors")


@pytest.mark.parametrize("accuracy", ["a", float("nan"), float("inf"), 7, -0.1, None, True, []])
def test_an_impossible_result_of_parity_is_refused(tmp_path, accuracy):
    saved(tmp_path, accuracy)
    with pytest.raises(ValueError, match=r"adatape-4-0.json: expected the result of adatape-4-0"):
        parity_table.run(tmp_path, CONFIG)


@pytest.mark.parametrize("model, length", [("transformer", 4), ("adatape", 6)])
def test_another_runs_model_is_refused(tmp_path, model, length):
    saved(tmp_path, model=model, length=length)
    with pytest.raises(ValueError, match=r"safetensors: expected the model of adatape-4-0, got an"):
        parity_table.run(tmp_path, CONFIG)


def test_a_run_without_its_model_is_not_done(tmp_path):
    saved(tmp_path)
    (run,) = CONFIG.runs()
    assert parity_table._finished(tmp_path, run, CONFIG) is not None
    (tmp_path / "adatape-4-0.safetensors").unlink()
    assert parity_table._finished(tmp_path, run, CONFIG) is None


def test_no_spread_of_one_seed():
    result = ParityResult("adatape", 4, 0, 0.5, 0.75, 1.0, 9, 3, 2.0, ())
    assert " to " not in parity_table.table([result]).splitlines()[2]
    assert " to " in parity_table.table([result, result]).splitlines()[2]


@pytest.mark.parametrize(
    "name, value",
    [
        ("accuracy", 7),
        ("accuracy", float("inf")),
        ("images_per_second", -5),
        ("images_per_second", float("inf")),
        ("mean_rows", 0),
        ("mean_tape_tokens", 1.0),
    ],
)
def test_an_impossible_result_of_compare_is_measured_again(tmp_path, name, value):
    config = CompareConfig(data="digits", models=("vit",), sizes=(1,), seeds=(0,), epochs=1)
    entry = {"model": "vit", "size": 1, "seed": 0, "accuracy": 0.5, "images_per_second": 9.0}
    entry |= {"images_per_second_p20_p80": [8.0, 9.0], "flops_per_image": 1e6, "parameters": 9}
    entry |= {"epochs": 1, "train_images": 9, "seconds": 1.0, "train_loss": 1.0}
    entry |= {"train_accuracy": 0.5, "mean_rows": 5.0, "mean_tape_tokens": None}
    report = {"options": compare_folder.options_of(config), "results": [entry]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert compare_folder.saved_results(tmp_path, config) is not None
    entry[name] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert compare_folder.saved_results(tmp_path, config) is None


class BankOfPatches:
    """A model's configuration as far as its bank is concerned."""

    image_size, bank_patch_size, bank, bank_size, topk = 8, 2, "input", 30, 5


class ModelWithPatches:
    config = BankOfPatches()


def test_a_tape_is_no_longer_than_its_bank_has_entries():
    assert [budget._possible(ModelWithPatches(), n) for n in (0, 3, 4, 1 << 20)] == [0, 3, 4, 4]


def test_images_that_differ_in_pixels_alone_are_others():
    class TwoImages:
        class_names, test_labels = ("a", "b"), torch.tensor([0, 1])

        def __init__(self, pixel):
            self.test_images = torch.full((2, 1, 4, 4), pixel, dtype=torch.uint8)

    assert budget._same_images(TwoImages(3), TwoImages(3))
    assert not budget._same_images(TwoImages(3), TwoImages(4))
