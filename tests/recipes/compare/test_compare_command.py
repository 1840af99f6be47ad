"""The command `compare` on the digits: its numbers, going on, and what it refuses."""

import json
import pickle
import shutil

import pytest
import torch
from fake_gpu import NAME, fake_gpu
from tiny_training import exit_code

import adatape_kernels as ak
from adatape_kernels.cli import main
from adatape_kernels.data.image_set import unit_range
from adatape_kernels.recipes import measure
from adatape_kernels.recipes.compare import (
    compare_calibration,
    compare_training,
    compare_work,
)
from adatape_kernels.recipes.compare.compare_config import CompareConfig, CompareRun
from adatape_kernels.recipes.compare.compare_measuring import measured
from adatape_kernels.recipes.compare.compare_plan import RunCost
from adatape_kernels.recipes.compare.compare_training import Trained, Training, images_of
from adatape_kernels.recipes.one_thread import one_thread
from adatape_kernels.recipes.training.train_loop import accuracy, predict

_NAN = '{"seconds": NaN, "train_loss": 1, "train_accuracy": 1}'
OPTIONS = ["compare", "--data", "digits", "--dim", "16", "--heads", "2", "--ffn", "16"]
OPTIONS += ["--limit", "60", "--rounds", "1", "--jobs", "1"]


def here(tasks, work, jobs, backends):
    """Work in this process, which spares the start of another."""
    for _, task in tasks:
        yield work(task, lambda message: None)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(compare_work, "in_processes", here)
    monkeypatch.setattr(compare_calibration, "_LEAST_TIMING", 0.01)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_work, "in_processes", here)
        patch.setattr(compare_calibration, "_LEAST_TIMING", 0.01)
        options = ["--sizes", "1,2", "--seeds", "3,4", "--epochs", "1"]
        assert main([*OPTIONS, *options, "--models", "adatape-input,avit", "--out", str(out)]) == 0
    return out


def results_of(out):
    return json.loads((out / "report.json").read_text())["results"]


def test_a_line_for_each_model_size_and_seed(compared):
    report = json.loads((compared / "report.json").read_text())
    keys = [(r["model"], r["size"], r["seed"]) for r in report["results"]]
    models, sizes = ("adatape-input", "avit"), (1, 2)
    assert keys == [(m, size, seed) for m in models for size in sizes for seed in (3, 4)]
    for result in report["results"]:
        assert result["images_per_second"] > 0 and result["seconds"] > 0
        assert result["epochs"] == 1 and result["train_images"] == 60
        tape = result["mean_tape_tokens"]
        assert (tape is None) == (result["model"] == "avit")
    assert report["options"]["seeds"] == [3, 4] and report["plan"]["rounds"] == 1
    assert {"machine", "torch", "adatape_kernels", "commit", "jobs"} <= report.keys()
    assert report["adatape_on_front"].keys() == {"images_per_second", "flops_per_image"}
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (compared / "table.md").read_text().count("\n| ") == 5


def test_numbers_are_those_of_the_models_that_were_written(compared):
    config = CompareConfig(data="digits", sizes=(1,), limit=60, epochs=1)
    data, normalise = images_of(config.train_config(next(config.runs()), 1, 60), None)
    for result in results_of(compared)[::3]:
        stem = CompareRun(result["model"], result["size"], result["seed"]).stem
        model = ak.load(compared / f"{stem}.safetensors").eval()
        output = predict(model, data.test_images, normalise)
        assert result["accuracy"] == accuracy(output, data.test_labels)
        assert result["parameters"] == sum(p.numel() for p in model.parameters())
        depth, images = result["size"], len(output)
        if result["model"] == "avit":
            assert result["mean_rows"] == sum(output.halted.rows_per_step) / images
        else:
            tape = output.tape_lens.double().mean().item()
            assert result["mean_tape_tokens"] == tape
            assert result["mean_rows"] == pytest.approx(depth * (4 + tape))


def test_flops_are_those_that_ran():
    """Of a ViT those that torch counts in its padded form; where tokens leave there are fewer."""
    config = CompareConfig(data="digits", sizes=(3,), models=("vit", "avit"), seeds=(0,), epochs=1)
    for run in config.runs():
        made = config.train_config(run, 1, None)
        data, normalise = images_of(made, None)
        model = compare_training.new_model(made, data, normalise)
        if run.model == "avit":
            model.encoder.gate.center = -4.0  # so that nearly all tokens halt at once
        image = normalise(unit_range(data.test_images[:1]))
        padded = measure.flops(lambda model=model, image=image: model.padded().eval()(image))
        found = measured(model, data, normalise)
        if run.model == "vit":
            assert found.flops_per_image == padded and found.mean_rows == 3 * 5
        else:
            assert found.flops_per_image < 0.7 * padded and found.mean_rows < 2 * 5


def test_a_run_is_the_one_that_train_trains(compared, tmp_path):
    """The same options give the same parameters, bit for bit."""
    options = ["train", "--data", "digits", "--dim", "16", "--heads", "2", "--ffn", "16"]
    options += ["--limit", "60", "--epochs", "1", "--model", "avit", "--depth", "1"]
    options += ["--seed", "4", "--split-seed", "0", "--out", str(tmp_path / "t")]
    with one_thread():
        assert main(options) == 0
    theirs = ak.load(tmp_path / "t").state_dict()
    ours = ak.load(compared / "avit-1-4.safetensors").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_command_again_changes_nothing(compared, monkeypatch, capsys):
    before = {file.name: file.read_bytes() for file in compared.iterdir()}
    monkeypatch.setattr(compare_work, "in_processes", None)
    options = ["--sizes", "1,2", "--seeds", "3,4", "--epochs", "1"]
    arguments = [*OPTIONS, *options, "--models", "adatape-input,avit", "--out", str(compared)]
    assert main(arguments) == 0
    assert "| avit " in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in compared.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(compared, tmp_path):
    options = ["--sizes", "1", "--seeds", "3", "--epochs", "1", "--models", "adatape-input,avit"]
    with fake_gpu():
        assert main([*OPTIONS, *options, "--device", "cuda", "--out", str(tmp_path / "c")]) == 0
    there = {(r["model"], r["size"], r["seed"]): r for r in results_of(compared)}
    for result in results_of(tmp_path / "c"):
        expected = there[result["model"], result["size"], result["seed"]]
        for name in ("accuracy", "train_loss", "mean_rows", "mean_tape_tokens", "parameters"):
            assert result[name] == expected[name]
    assert json.loads((tmp_path / "c" / "report.json").read_text())["device"] == NAME


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "c"
    begun = []

    def interrupted(tasks, work, jobs, backends):
        for done, result in enumerate(here(tasks, work, jobs, backends)):
            if isinstance(result, Trained) and done == 1:
                raise KeyboardInterrupt
            yield result

    def noted(tasks, work, jobs, backends):
        begun.extend(name for name, _ in tasks)
        yield from here(tasks, work, jobs, backends)

    monkeypatch.setattr(compare_work, "in_processes", interrupted)
    arguments = [*OPTIONS, "--sizes", "1", "--seeds", "0", "--epochs", "1", "--out", str(out)]
    arguments += ["--models", "vit,uvit"]
    assert main(arguments) == 130
    assert "holds 1 of 2 runs; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(compare_work, "in_processes", noted)
    assert main(arguments) == 0
    assert len(begun) == 1 and len(results_of(out)) == 2
    # One seed has no spread.
    assert "±" not in (out / "table.md").read_text()
    other = [word if word != "60" else "61" for word in arguments]
    capsys.readouterr()
    assert main(other) == 2
    line = capsys.readouterr().err
    assert "limit: expected 60, as in" in line and len(line.splitlines()) == 1


def test_a_budget_gives_all_models_the_same_training(tmp_path, monkeypatch):
    out = tmp_path / "c"
    arguments = [*OPTIONS, "--sizes", "1", "--seeds", "0", "--models", "vit,uvit"]
    arguments += ["--budget", "2s"]
    plan = compare_calibration.planned

    def all_but_a_moment(config, costs, **facts):
        """However busy the machine is while costs are timed, an epoch fits into the moment."""
        costs = {each: RunCost(*map(min, cost, (1e-3, 1e-4))) for each, cost in costs.items()}
        facts |= {"spent": 0.95 * config.budget - 0.4, "loading": min(facts["loading"], 1e-5)}
        return plan(config, costs, **facts)

    monkeypatch.setattr(compare_calibration, "planned", all_but_a_moment)
    assert main([*arguments, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert len({(r["epochs"], r["train_images"]) for r in report["results"]}) == 1
    # Whole epochs may take 1.04 times the 0.4 s that are left.
    assert 0 < report["plan"]["training_seconds"] <= 1.04 * 0.4
    assert report["options"]["budget"] == 2


def test_tasks_can_be_sent_to_another_process():
    config = CompareConfig(epochs=1)
    run = next(config.runs())
    task = compare_training.TrainTask(run, config.train_config(run, 1, None), None)
    for sent in (task, compare_training.TimingTask(task, 1.0)):
        assert pickle.loads(pickle.dumps((sent, compare_training.work)))[0] == sent


def test_a_plan_or_a_report_that_is_altered_is_seen(compared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "c"
    shutil.copytree(compared, out)
    options = ["--sizes", "1,2", "--seeds", "3,4", "--epochs", "1"]
    arguments = [*OPTIONS, *options, "--models", "adatape-input,avit", "--out", str(out)]
    plan = (out / "plan.json").read_text()
    for old, new in (
        ('"rounds": 1,\n    "batch"', '"rounds": "x",\n    "batch"'),
        ('"images": 60', '"images": 0'),
        ('"avit",\n      2', '"avit",\n      3'),
        ('"fitting_epochs": null', '"fitting_epochs": []'),
    ):
        assert old in plan
        (out / "plan.json").write_text(plan.replace(old, new))
        assert main(arguments) == 2
        assert "plan.json: expected the plan of a comparison" in capsys.readouterr().err
    (out / "plan.json").write_text(plan)
    other = plan.replace('"test_images_sha256": "', '"test_images_sha256": "0')
    (out / "plan.json").write_text(other)
    assert main(arguments) == 2
    assert "got others, whose test images differ" in capsys.readouterr().err
    (out / "plan.json").write_text(plan)
    report = json.loads((out / "report.json").read_text())
    report["results"][0]["accuracy"] = "high"
    (out / "report.json").write_text(json.dumps(report))
    assert main(arguments) == 0  # and measured again, with nothing to train
    assert "8 of 8 runs are trained already" in capsys.readouterr().out
    assert results_of(out)[0]["accuracy"] == results_of(compared)[0]["accuracy"]


def test_a_loss_that_is_not_finite_names_run_and_step(tmp_path, monkeypatch, capsys):
    new_model = compare_training.new_model

    def broken(*arguments):
        model = new_model(*arguments)
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        return model

    def caught(tasks, work, jobs, backends):
        for name, task in tasks:
            if isinstance(task, compare_training.TrainTask):
                monkeypatch.setattr(compare_training, "new_model", broken)
            try:
                yield work(task, lambda message: None)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None

    monkeypatch.setattr(compare_work, "in_processes", caught)
    arguments = [*OPTIONS, "--sizes", "1", "--seeds", "0", "--epochs", "1", "--models", "vit"]
    assert main([*arguments, "--out", str(tmp_path / "c")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "vit-1-0: loss: expected a finite value at epoch 1, step 1 of " in line


def test_files_that_are_not_ours_are_refused_by_name(tmp_path, capsys):
    arguments = [*OPTIONS, "--sizes", "1", "--seeds", "0", "--epochs", "1", "--models", "vit"]
    out = tmp_path / "c"
    out.mkdir()
    (out / "checkpoint.json").write_text("{}")
    assert main([*arguments, "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert "out: expected a new or empty folder" in line and "holds checkpoint.json" in line
    for content in (
        "",
        "[]",
        "{}",
        '{"options": 3, "data": {}, "plan": {}, "costs": []}',
        "[" * 9999,
    ):
        (out / "plan.json").write_text(content)
        assert main([*arguments, "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert "plan.json: expected" in line and len(line.splitlines()) == 1


def test_the_result_of_a_run_that_is_damaged_is_named(tmp_path):
    from adatape_kernels.recipes.compare.compare_folder import saved_run

    run = CompareRun("vit", 2, 0)
    assert saved_run(tmp_path, run) is None
    file = tmp_path / "vit-2-0.json"
    file.write_text(json.dumps(Training(1.0, 2.0, 0.5)._asdict()))
    assert saved_run(tmp_path, run) is None  # without its model it is trained again
    (tmp_path / "vit-2-0.safetensors").write_bytes(b"")
    for content in ("", "[]", '{"seconds": 1}', '{"seconds": []}', _NAN):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"vit-2-0.json: expected"):
            saved_run(tmp_path, run)
    file.write_text(json.dumps(Training(1.0, 2.0, 0.5)._asdict()))
    assert saved_run(tmp_path, run) == Training(1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "adatape"], ["models: expected some of adatape-input", "'adatape'"]),
        (["--models", "vit,vit"], ["models: expected one or more distinct"]),
        (["--sizes", "0"], ["sizes: expected 1 to", "got 0"]),
        (["--sizes", "2,x"], ["--sizes"]),
        (["--seeds", "-1"], ["seeds: expected 0 to", "got -1"]),
        (["--budget", "20"], ["budget: expected a time such as", "'20'"]),
        (["--budget=-3m"], ["budget: expected a time such as", "'-3m'"]),
        (["--budget", "-3m"], ["--budget"]),
        (["--budget", "5m", "--epochs", "2"], ["got both"]),
        (["--epochs", "0"], ["epochs: expected 1 to"]),
        (["--limit", "100000", "--epochs", "1"], ["limit: expected 1 to 1437"]),
        (["--jobs", "0"], ["jobs: expected 1 to"]),
        (["--rounds", "0"], ["rounds: expected 1 to"]),
        (["--dim", "15"], ["dim"]),
        (["--lr", "nan"], ["lr: expected a number"]),
        (["--data-dir", "/nowhere"], ["data-dir: expected none for digits"]),
        (["--backend", "cudnn"], ["use_backend: expected one of"]),
    ],
)
def test_refusals_are_one_line_before_anything_is_written(tmp_path, capsys, arguments, words):
    out = tmp_path / "c"
    code = exit_code(["compare", "--data", "digits", *arguments, "--out", str(out)])
    line = capsys.readouterr().err
    assert code == 2 and len(line.splitlines()) == 1
    assert all(word in line for word in words)
    assert not out.exists()


def test_images_that_are_damaged_are_one_line_that_names_the_file(tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no images")
    arguments = ["compare", "--data", "mnist", "--data-dir", str(folder), "--budget", "1m"]
    assert main([*arguments, "--out", str(tmp_path / "c")]) == 2
    line = capsys.readouterr().err
    assert "train-images-idx3-ubyte" in line and len(line.splitlines()) == 1
    assert not (tmp_path / "c").exists()
