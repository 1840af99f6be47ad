"""`finetune`: a ViT without and with tapes, beside each other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from adatape_kernels.cli import main
from adatape_kernels.data import augment
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.finetune import finetune_report
from adatape_kernels.recipes.finetune.finetune import PLAN, SOURCE, run
from adatape_kernels.recipes.finetune.finetune_report import CONTROL, KINDS
from adatape_kernels.recipes.training import train

TINY = {"data": "digits", "dim": 16, "depth": 1, "heads": 2, "ffn": 16, "num_tape_tokens": 3}
TINY |= {"topk": 2, "limit": 60, "batch": 20, "epochs": 1, "bank_size": 30}
FILES = {PLAN, SOURCE, "report.json", "source", *(f"{kind}-{n}" for kind in KINDS for n in (0, 1))}


@pytest.fixture(scope="module", autouse=True)
def short_reports():
    """Times nothing often and draws nothing, which other tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ROUNDS", 1)
        patch.setattr(finetune_report, "ROUNDS", 1)
        patch.setattr(pictures, "draw_all", lambda *given: None)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "comparison"
    return out, run(out, TINY, source_epochs=2, seeds=2)


def test_the_report_sets_every_kind_beside_the_control(unbroken):
    out, found = unbroken
    assert {file.name for file in out.iterdir()} == FILES
    entries = json.loads((out / "report.json").read_text())
    assert entries["plan"]["options"] == TINY and entries["torch"] == torch.__version__
    for kind, result in found.kinds.items():
        reports = [json.loads((out / f"{kind}-{n}" / "report.json").read_text()) for n in (0, 1)]
        assert list(result.test_accuracy) == [report["test_accuracy"] for report in reports]
        assert [report["config"]["seed"] for report in reports] == [0, 1]
        assert {report["config"]["split_seed"] for report in reports} == {0}
        assert entries["kinds"][kind]["test_accuracy"] == list(result.test_accuracy)
    control = found.kinds[CONTROL]
    assert control.mean_tape_length == (0, 0) and control.rows == 4
    assert control.unread_test_accuracy == control.test_accuracy
    for kind in ("input", "learn"):
        result = found.kinds[kind]
        assert result.rows > 4 and result.flops > control.flops
        pairs = zip(result.test_accuracy, control.test_accuracy, strict=True)
        assert found.added(kind) == tuple(a - b for a, b in pairs)
        assert entries["kinds"][kind]["added_test_accuracy"] == list(found.added(kind))


def test_the_converted_models_are_the_source_while_they_read_nothing(unbroken):
    out, found = unbroken
    source = json.loads((out / "source" / "report.json").read_text())
    assert found.source_test_accuracy == source["test_accuracy"]
    assert found.conversion.keys() == {"input", "learn"}
    for conversion in found.conversion.values():
        assert conversion.max_abs_logit_difference < 1e-5
        assert conversion.test_accuracy == found.source_test_accuracy
    assert "blocks.0.attn.qkv.weight" in load_file(out / SOURCE)


def test_the_table_says_what_the_tape_adds(unbroken):
    lines = unbroken[1].table().splitlines()
    row = next(line for line in lines if line.startswith("tape of image patches"))
    assert f"{50 * sum(unbroken[1].added('input')):+.2f} pp" in row
    assert any(line.startswith("fine-tuned, 2 seeds") for line in lines)


def test_an_interrupted_comparison_goes_on_to_the_same_figures(
    unbroken, tmp_path, monkeypatch, capsys
):
    calls, original = [], augment.turn_and_move

    def turn_and_move(*given):
        calls.append(1)
        if len(calls) == 11:  # in the second run that begins with the source
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(augment, "turn_and_move", turn_and_move)
    out = tmp_path / "comparison"
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run(out, TINY, source_epochs=2, seeds=2)
    assert not (out / "report.json").exists() and (out / SOURCE).exists()
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    assert len(calls) == 2 * 3 + 3 * 6 + 2
    found = json.loads((out / "report.json").read_text())
    for kind, result in unbroken[1].kinds.items():
        assert found["kinds"][kind]["test_accuracy"] == list(result.test_accuracy)


def test_a_source_that_is_brought_is_fine_tuned(unbroken, tmp_path):
    out, given = tmp_path / "comparison", unbroken[0] / SOURCE
    options = {name: TINY[name] for name in TINY if name not in ("dim", "depth", "ffn")}
    found = run(out, options, source=given, seeds=1)
    assert found.source_test_accuracy == unbroken[1].source_test_accuracy
    assert not (out / "source").exists() and not (out / SOURCE).exists()
    first = {kind: result.test_accuracy[:1] for kind, result in unbroken[1].kinds.items()}
    assert {kind: result.test_accuracy for kind, result in found.kinds.items()} == first


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "0"], "seeds: expected 1 to 100, got 0"),
        (["--topk", "99"], "topk: expected"),
        (["--source-epochs", "0"], "epochs: expected 1 or more, got 0"),
        (["--source", "absent.safetensors"], "source: expected a safetensors file"),
        (["--data", "svhn"], "data: expected one of digits"),
        (["--bank", "learn"], "bank: expected none, as both kinds are compared"),
        (["--num-tape-tokens", "0"], "num-tape-tokens: expected 1 or more"),
        (["--seed", "4294967295"], "seed: expected 0 to 4294967295"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, more, words):
    out = tmp_path / "comparison"
    assert main(["finetune", "--data", "digits", "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not out.exists()


def test_options_of_another_kind_are_refused_by_name(tmp_path):
    for options, error in (({"width": 3}, "options"), ({"dim": "wide"}, "dim"), (5, "options")):
        with pytest.raises((ValueError, TypeError), match=f"^{error}: expected"):
            run(tmp_path / "run", options if options == 5 else {"data": "digits", **options})
    assert not (tmp_path / "run").exists()


def test_a_folder_goes_on_only_as_it_was_started(unbroken, tmp_path, capsys):
    out = str(unbroken[0])
    for words, expected in (
        (["--data", "digits"], "out: expected a new or empty folder, or --resume"),
        (["--resume", "--seeds", "3"], "seeds: expected 2, as in"),
        (["--resume", "--dim", "32"], "dim: expected 16, as in"),
        (["--resume", "--out", str(tmp_path)], "resume: expected"),
    ):
        assert main(["finetune", "--out", out, *words]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    for content in (b"", b"[]", b"{}", b'{"options": 5}', (unbroken[0] / PLAN).read_bytes()[:-9]):
        (tmp_path / PLAN).write_bytes(content)
        assert main(["finetune", "--out", str(tmp_path), "--resume"]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / PLAN) in error and error.count("\n") == 1, error


@pytest.mark.parametrize("given", [{}, {"source": "vit.safetensors"}], ids=["train", "given"])
def test_an_image_set_that_is_not_there_leaves_nothing(unbroken, tmp_path, given):
    source = {"source": unbroken[0] / SOURCE} if given else {}
    options = {"data": "imagefolder", **({"heads": 2, "topk": 1} if given else {"patch": 4})}
    with pytest.raises(ValueError, match=r"data-dir: expected a folder at .*, got no such folder"):
        run(tmp_path / "out", options, data_dir=tmp_path / "absent", **source)
    assert not (tmp_path / "out").exists()
