"""Two and three processes give what one gives, to rounding."""

import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_python import run
from rank_cases import BATCHES, DIVIDED_EPOCHS, EPOCHS, STEPS
from rank_models import CPU, new_model
from rank_runs import CHAINS
from torch import nn

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.distributed.imbalance import RANK_METRICS
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.rank_workers import device_of_each, runs_at_a_time
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.finetune.finetune_report import KINDS
from adatape_kernels.recipes.training.epoch_metrics import METRICS, check_history, metrics_csv
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_config import TrainConfig

HERE = Path(__file__).parent
TWO = Ranks(1, 2, 1)
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by the number of processes and the rank."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run(
        [HERE / "rank_cases.py", folder],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    files = folder.glob("*.pt")
    results = {tuple(map(int, f.stem.split("-"))): torch.load(f) for f in files}
    words = {f.stem: f.read_text() for f in folder.glob("*.txt")}
    written = (folder / "written").read_bytes()
    codes = torch.load(folder / "codes")
    chains = {chain: checkpoint.load(folder / chain) for chain in CHAINS}
    runs = torch.load(folder / "runs")
    commands = {file.name: torch.load(file) for file in folder.glob("commands-*")}
    others = {"runs": runs, "commands": commands, "words": words, "written": written}
    others |= {"codes": codes, "chains": chains}
    return {**results, **others, "stderr": done.stderr}


@needs_gloo
@pytest.mark.parametrize("parallel", ["", "fsdp-"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("kind", "images", "parts"), STEPS)
def test_a_step_of_several_processes_is_that_of_one(found, count, kind, images, parts, parallel):
    name = f"{kind}-{images}-{parts}"
    expected = found[1, 0][name]
    for rank in range(count):
        actual = found[count, rank][parallel + name]
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-11)


@needs_gloo
@pytest.mark.parametrize("count", [2, 3])
def test_divided_layers_may_be_computed_twice(found, count):
    expected = found[1, 0][f"adatape-{BATCHES[0]}-1"]
    actual = found[count, 1]["fsdp, layers twice"]
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-11)


@needs_gloo
@pytest.mark.parametrize(
    ("count", "kind"),
    [(count, kind) for count in (2, 3) for kind in (*EPOCHS, f"fsdp-{DIVIDED_EPOCHS[count]}")],
)
def test_epochs_of_several_processes_are_those_of_one(found, count, kind):
    """With mixup, clipping, an average, a ragged last batch, and the evaluation shared."""
    expected = found[1, 0][kind.removeprefix("fsdp-")]
    for rank in range(count):
        actual = found[count, rank][kind]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        for name, of_first in found[count, 0][kind].items():
            assert torch.equal(actual[name], of_first), name  # the ranks stay equal to the bit


@needs_gloo
def test_each_epoch_says_how_equally_it_was_shared(found):
    assert found[1, 0]["shares"] == [None, None]
    for count in (2, 3):
        for share in found[count, 1]["shares"]:
            assert share["processes"] == count
            assert 0 <= share["idle_share"] < 1
            assert share["most_rows"] >= share["rows_per_rank"] > 0
            assert share["idle_share"] == 1 - share["rows_per_rank"] / share["most_rows"]


@needs_gloo
def test_rank_0_alone_shows_a_bar(found):
    """For each way to prepare batches three times: of one process, of two and of three.

    With the parameters divided once more. A bar shows its end up to two times.
    """
    assert found["stderr"].count("2/2") > 0
    assert found["stderr"].count("an epoch") == 0
    runs = 3 + 3 + 1
    assert 0 < found["stderr"].count("34/34") <= 2 * runs


@needs_gloo
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_in_other_processes_and_with_others_parts(found, chain):
    """With AdamW, clipping and an average; of "killed" the parts are lost that were written."""
    for codes, (_, parallel) in zip(found["codes"][chain], CHAINS[chain], strict=True):
        expected = [2, -signal.SIGKILL] if parallel == "killed" else [0] * len(codes)
        assert codes == expected
    expected, actual = found["chains"]["unbroken"], found["chains"][chain]
    assert (actual.epoch, actual.step) == (2, 6)
    torch.testing.assert_close(actual.history, expected.history, atol=1e-5, rtol=1e-4)
    tensors = dict(actual.tensors)
    rows = tensors.pop("rows of images", None)
    torch.testing.assert_close(tensors, expected.tensors, atol=1e-5, rtol=1e-4)
    if chain != "unbroken":
        assert rows.dtype == torch.int32 and rows.shape == (17,) and (rows >= 5).all()


@needs_gloo
def test_a_rank_that_is_killed_while_it_writes_its_part_stops_all_with_one_line(found):
    (line,) = last_words(found, "killed", 2)
    assert "of 2: expected an answer of every other rank, and one is gone" in line


def last_words(found, fault, ranks=3):
    """The lines that all ranks together have said."""
    texts = (found["words"][f"{fault}-{rank}"] for rank in range(ranks))
    return [line for text in texts for line in text.splitlines() if "adatape-kernels" in line]


@needs_gloo
def test_a_killed_rank_stops_all_with_one_line(found):
    assert found["codes"]["wait_for_the_dead"] == [2, -signal.SIGKILL, 2]
    (line,) = last_words(found, "wait_for_the_dead")
    assert "of 3: expected an answer of every other rank, and one is gone" in line
    written = found["written"]
    assert written == len(written) // 5 * b"whole" and len(written) >= 10


@needs_gloo
def test_a_rank_that_fails_is_the_one_that_says_why(found):
    assert found["codes"]["fail"] == [2, 2, 2]
    assert last_words(found, "fail") == [
        "adatape-kernels: photos/a.jpg: expected an image, got another file"
    ]


@needs_gloo
def test_a_rank_that_is_silent_is_noticed(found):
    assert found["codes"]["hang"] == [2, -signal.SIGKILL, 2]
    (line,) = last_words(found, "hang")
    assert line.endswith(
        "rank 0 of 3: expected to hear of rank 1 within 0.5 seconds, and it is gone"
    )


@needs_gloo
def test_runs_are_dealt_out_to_the_ranks(found):
    *runs, first, second = found["runs"]
    assert (first, second) == ("half of it", "all of it")
    assert sorted(number for number, _, _ in runs) == [*range(5)]
    assert {(rank, threads) for _, rank, threads in runs} == {(1, 1), (2, 1)}
    assert found["codes"]["deal_runs"][0] == 2
    assert last_words(found, "deal_runs") == [
        "adatape-kernels: run 5: loss: expected a finite value, got nan"
    ]


@needs_gloo
def test_ranks_share_the_demo_and_the_runs_of_finetune(found):
    assert found["codes"]["commands of 2"] == [0, 0] and found["codes"]["commands of 1"] == [0]
    alone, leads, follows = (
        found["commands"][f"commands-{name}"] for name in ("1-0", "2-0", "2-1")
    )
    torch.testing.assert_close(leads["weights"], alone["weights"], atol=1e-3, rtol=1e-2)
    assert follows["weights"] is None
    names = ["source", *(f"{kind}-{number}" for number in range(2) for kind in KINDS)]
    names.remove("input-1")
    for found_by in (alone, leads, follows):
        assert found_by["calls"] == [(name, False) for name in names]
    assert (alone["seeds"], leads["seeds"], follows["seeds"]) == (2, 2, None)


def test_under_torchrun_jobs_are_the_processes(monkeypatch):
    assert runs_at_a_time(3, CPU) == 3
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert runs_at_a_time(None, CPU) == 5
    assert device_of_each(torch.device("cuda", 3)) == torch.device("cuda")
    with pytest.raises(ValueError, match=r"^jobs: expected none under torchrun, .* got 3$"):
        runs_at_a_time(3, CPU)


def test_a_run_goes_on_with_another_number_of_processes():
    """Its metrics have further columns for the epochs that several have shared."""
    config = TrainConfig.of({"data": "digits", "epochs": 3})
    alone = dict.fromkeys(METRICS, 0.5) | {"epoch": 1}
    shared = alone | dict.fromkeys(RANK_METRICS, 2.0) | {"epoch": 2}
    check_history([alone, shared], asdict(config))
    assert metrics_csv([alone], METRICS).decode().splitlines()[0] == ",".join(METRICS)
    lines = metrics_csv([alone, shared], METRICS).decode().splitlines()
    assert lines[0] == ",".join((*METRICS, *RANK_METRICS))
    assert lines[1].endswith(",0.5,,,,") and lines[2].endswith(",2.0,2.0,2.0,2.0")
    del shared["idle_share"]
    with pytest.raises(ValueError, match=r"^history: expected epoch, .* for each epoch"):
        check_history([alone, shared], asdict(config))


def test_without_torchrun_there_is_one_process():
    with started(CPU) as ranks:
        assert ranks == Ranks() and ranks.leads and not ranks.several
        assert not dist.is_initialized()
        assert Ranks.of_environment({"RANK": "0", "WORLD_SIZE": "1"}) == ranks


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "9")]
)
def test_damaged_variables_are_refused(name, value):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", name: value}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got '?{value}"):
        Ranks.of_environment(given)


def test_what_cannot_be_shared_is_refused():
    execution = Execution(ranks=TWO)
    with pytest.raises(ValueError, match=r"^parallel: expected 'ddp' or 'fsdp', got 'zero'"):
        Execution(parallel="zero")
    with pytest.raises(ValueError, match=r"^compile: expected one process, got 2"):
        Execution(compiled=True, ranks=TWO)
    normed = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^processes: expected 1 with the batch norm 0.* got 2$"):
        execution.check_model(normed)

    execution.check_model(new_model("avit"))
    model = new_model("avit")
    object.__setattr__(model.config, "distribution_weight", 0.1)
    with pytest.raises(ValueError, match=r"^processes: expected 1 for an A-ViT.* got 2$"):
        execution.check_model(model)


def test_commands_that_do_not_train_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info"]) == 2
    assert capsys.readouterr().err == (
        "adatape-kernels: torchrun: expected one of train, demo, finetune, parity, compare, "
        "got info\n"
    )
