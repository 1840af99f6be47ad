"""Commands under torchrun that meet with faults: each says one line, and goes on afterwards."""

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_python import run

from adatape_kernels.cli import main
from adatape_kernels.data.image_set import Normaliser
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.training.data_fingerprint import data_facts, facts_of_ranks
from adatape_kernels.recipes.training.epoch_metrics import METRICS

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="a run asks for it before it begins")

HERE = Path(__file__).parent
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands have left."""
    made = tmp_path_factory.mktemp("commands")
    done = run(
        [HERE / "rank_commands.py", made],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def codes(folder):
    return torch.load(folder / "codes")


def lines(folder, name):
    """The errors that all ranks have printed, without the name of the command."""
    texts = (file.read_text() for file in folder.glob(f"{name}-[0-9].txt"))
    said = [line for text in texts for line in text.splitlines()]
    head = "adatape-kernels: "
    return [line.removeprefix(head) for line in said if line.startswith(head)]


def curve(history):
    names = [name for name in METRICS if name != "images_per_second"]
    return torch.tensor([[row[name] for name in names] for row in history]).double()


@needs_gloo
@pytest.mark.parametrize(
    ("name", "ended", "said"),
    [
        ("killed", [2, -signal.SIGKILL, 2], "one is gone; --resume goes on from"),
        ("killed of fsdp", [2, -signal.SIGKILL], "one is gone; --resume goes on from"),
        ("full disk", [2, 2], "bytes, got File too large"),
    ],
)
def test_what_ends_a_rank_ends_all_and_torchrun_goes_on(folder, codes, name, ended, said):
    """With parts of batches, an average, mixing, layers computed twice and drawn thresholds."""
    assert codes["one"] == [0]
    assert codes[name] == ended
    (line,) = lines(folder, name)
    assert said in line
    before = json.loads((folder / f"{name}.json").read_text())
    assert before["epoch"] == 1

    assert codes[f"{name}, again"] == [0] * len(ended)
    assert lines(folder, f"{name}, again") == []
    for rank in range(1, len(ended)):  # of torch's warnings, too
        assert (folder / f"{name}, again-{rank}.txt").read_text() == ""
    saved, whole = (checkpoint.load(folder / each) for each in (name, "one"))
    assert saved.history[0] == before["history"][0]
    torch.testing.assert_close(curve(saved.history), curve(whole.history), atol=2e-3, rtol=0)
    shared = {key: tensor for key, tensor in saved.tensors.items() if key in whole.tensors}
    assert shared.keys() == whole.tensors.keys()
    parts = 2 if saved.environment["parallel"] == "fsdp" else 0
    files = {"checkpoint.json", "best.safetensors", "metrics.csv", "config.yaml"}
    left = {file.name for file in (folder / name).iterdir()} - files
    assert len(left) == 1 + parts and all(file.startswith("checkpoint-2") for file in left)


@needs_gloo
def test_divided_parameters_that_torchrun_goes_on_with_are_those_of_an_unbroken_run(folder, codes):
    """The sums of two ranks do not depend on which of them came first."""
    assert codes["two of fsdp"] == [0, 0]
    whole, again = (checkpoint.load(folder / name) for name in ("two", "killed of fsdp"))
    assert again.epoch == whole.epoch == 2
    torch.testing.assert_close(curve(again.history), curve(whole.history), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again.tensors, whole.tensors, atol=1e-6, rtol=1e-5)


@needs_gloo
def test_when_all_are_asked_to_end_one_of_them_says_what_is_kept(folder, codes):
    """Each hears of it twice and more, as where a terminal and torchrun both pass it on."""
    assert codes["all interrupted"] in ([130, 130], [2, 130], [130, 2])
    (line,) = lines(folder, "all interrupted")
    assert line.endswith("all holds epoch 1 of 2; --resume goes on from there")


@needs_gloo
def test_a_rank_that_waits_for_others_hears_that_it_is_to_end(folder, codes):
    assert codes["too soon"] == [130, 2]
    assert lines(folder, "too soon") == ["interrupted"]


@needs_gloo
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no number", "argument --epochs: "),
        ("no device", "device: "),
        ("no heads", "heads"),
        ("unused", "topk: expected none with --num-tape-tokens 0"),
        ("refused by one", "argument --epochs: "),
    ],
)
def test_what_is_wrong_with_options_is_said_once(folder, codes, name, said):
    """Whether all ranks are asked for it or one alone, for whom the other one does not wait."""
    assert codes[name] == [2, 2]
    words = "".join((folder / f"{name}-{rank}.txt").read_text() for rank in range(2))
    assert words.startswith("adatape-kernels") and words.count("\n") == 1
    assert said.removeprefix("argument ") in words
    assert not (folder / "new").exists()


@needs_gloo
def test_help_is_printed_by_rank_0(folder, codes):
    assert codes["help"] == [0, 0]
    first, second = ((folder / f"help-{rank}.txt").read_text() for rank in range(2))
    assert "--epochs" in first and second == ""


@needs_gloo
@pytest.mark.parametrize(
    ("name", "option"), [("seeds", "seed"), ("tables", "steps"), ("kinds", "seeds")]
)
def test_commands_that_share_runs_want_the_same_of_all_ranks(folder, codes, name, option):
    assert codes[f"other {name}"] == [2, 2]
    (line,) = lines(folder, f"other {name}")
    assert line.startswith(f"{option}: expected the same on every rank, got ")
    assert line.endswith("on rank 1")


@needs_gloo
def test_parity_in_two_ranks_has_the_table_of_one_process_and_goes_on(folder, codes):
    assert codes["table of one"] == [0]
    assert codes["table"] == codes["table, again"] == [0, 0]
    reports = {
        name: json.loads((folder / name / "report.json").read_text())
        for name in ("table of one", "table")
    }
    one, two = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in report["results"]]
        for report in reports.values()
    )
    assert one == two and [result["model"] for result in one] == ["adatape", "transformer"]
    first = (folder / "table of one-0.txt").read_text()
    assert header(first) == header((folder / "table-0.txt").read_text()) != []
    names = {file.name for file in (folder / "table").iterdir()}
    assert names == {file.name for file in (folder / "table of one").iterdir()}


def header(text):
    return [line for line in text.splitlines() if line.lstrip().startswith("length")]


@needs_gloo
def test_what_comes_behind_an_interrupt_does_not_cut_its_line_off(folder, codes):
    assert codes["interrupted"] == [2, 130]
    (line,) = lines(folder, "interrupted")
    assert line.startswith("interrupted: ")
    assert line.endswith("holds epoch 1 of 2; --resume goes on from there")
    assert checkpoint.load(folder / "interrupted").epoch == 1


@needs_gloo
def test_bf16_with_divided_parameters_has_the_curve_of_one_process(folder, codes):
    assert codes["one bf16"] == [0] and codes["bf16"] == [0, 0]
    one, two = (checkpoint.load(folder / name) for name in ("one bf16", "bf16"))
    assert two.config["dtype"] == "bf16" and two.environment["parallel"] == "fsdp"
    torch.testing.assert_close(curve(two.history), curve(one.history), atol=1e-2, rtol=0)
    assert all(tensor.dtype != torch.bfloat16 for tensor in two.tensors.values())


@needs_gloo
def test_ranks_that_are_asked_for_other_things_are_refused(folder, codes):
    assert codes["other sizes"] == [2, 2]
    assert lines(folder, "other sizes") == [
        "dim: expected the same on every rank, got 16 on rank 0 and 32 on rank 1"
    ]
    assert not (folder / "new").exists()


@needs_gloo
def test_divided_parameters_need_one_folder_for_all_ranks(folder, codes):
    assert codes["other folders"] == [2, 2]
    (line,) = lines(folder, "other folders")
    assert line.startswith("out: expected one folder that all ranks see, as every rank writes")
    assert line.endswith("on rank 1")
    assert not [*(folder / "own-1").iterdir()]
    assert not (folder / "own-0" / "checkpoint.json").exists()


def test_facts_that_ranks_compare_are_those_of_the_images_alone():
    from rank_models import DATA

    facts = data_facts(DATA, Normaliser((0.5,), (0.3,)), None)
    again = data_facts(DATA, Normaliser((0.5,), (0.30001,)), None)
    assert facts_of_ranks(facts) == facts_of_ranks(again)
    other = {**facts, "test_images_sha256": "0" * 64}
    named = {
        key for key, value in facts_of_ranks(other).items() if value != facts_of_ranks(facts)[key]
    }
    assert named == {"data-dir: hash of the test images"}


@pytest.fixture
def torchrun(monkeypatch):
    """The variables of a single process that torchrun has started, and its store."""
    store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    found |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found |= {"TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    yield store


@needs_gloo
@pytest.mark.parametrize(
    ("command", "file"), [("train", "checkpoint.json"), ("finetune", "finetune.json")]
)
def test_a_refused_command_is_refused_when_torchrun_repeats_it(
    torchrun, tmp_path, capsys, command, file
):
    """The folder holds a run that another command has begun."""
    (tmp_path / file).write_text("{}")
    assert main([command, "--data", "digits", "--out", str(tmp_path)]) == 2
    assert "out: expected a new " in capsys.readouterr().err
    assert (tmp_path / file).read_text() == "{}"

    key = str(tmp_path.resolve())
    dist.PrefixStore("adatape-kernels/runs", torchrun).set(key, "begun")
    assert main([command, "--data", "digits", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / file}: expected" in capsys.readouterr().err  # it was to go on


@needs_gloo
@pytest.mark.parametrize(
    ("name", "value"),
    [("MASTER_PORT", "abc"), ("MASTER_PORT", "99999"), ("MASTER_ADDR", ""), ("MASTER_PORT", "0")],
)
def test_a_damaged_place_of_the_store_is_refused(monkeypatch, tmp_path, capsys, name, value):
    found = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for key, text in {**found, "MASTER_PORT": "29500", name: value}.items():
        monkeypatch.setenv(key, text)
    for agent in ("True", "False"):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
        assert main(["train", "--data", "digits", "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == (
            f"adatape-kernels: {name}: expected a {'host' if 'ADDR' in name else 'port'} from "
            f"torchrun, got {value!r}\n"
        )
