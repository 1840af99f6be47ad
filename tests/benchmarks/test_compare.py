"""Records, and what is made of them: comparison, tables, plots, and the run on a GPU machine."""

import dataclasses
import sys
import time
from pathlib import Path

import pytest

import adatape_kernels
from adatape_kernels.benchmarks import gpu
from adatape_kernels.benchmarks.gpu import GpuStep
from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.harness.cases import OURS
from adatape_kernels.benchmarks.harness.records import CaseKey
from adatape_kernels.benchmarks.reports import compare_results, result_tables
from adatape_kernels.recipes.measure import Timing

RESULTS = Path(adatape_kernels.__file__).parents[1] / "benchmarks" / "results"
CASE = CaseKey("elastic_attention", "forward", "float32", "B=16 N=197")


def row(provider, seconds=None, *, case=CASE, status="ok", note="", percent=50.0):
    timing = seconds and Timing(seconds, 0.9 * seconds, 1.1 * seconds)
    limit = seconds and seconds * percent / 100
    return records.row(
        case, provider, "cpu", status=status, note=note, timing=timing, flops=1e9, limit_s=limit
    )


def write(path, *rows):
    records.append(path, rows)
    return path


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [
        row(OURS, 0.125),
        row("peer, with a comma", status="skipped", note='it said "no", twice'),
        dataclasses.replace(row("third", 0.5), peak_bytes=123),
    ]
    path = write(tmp_path / "rows.csv", *rows[:1])
    assert records.read(write(path, *rows[1:])) == rows


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (",ok,", ",fine,"),
        ("0.125", ""),
        ("0.125", "fast"),
        (",1e+09,", ",1e+09,,,,,,,,,,,,,,,,,,,"),
    ],
)
def test_a_broken_row_is_named_by_its_line(old, new, tmp_path):
    path = write(tmp_path / "rows.csv", row("first", 0.5), row(OURS, 0.125))
    lines = path.read_text().splitlines()
    assert old in lines[2]
    path.write_text("\n".join([*lines[:2], lines[2].replace(old, new, 1)]) + "\n")
    with pytest.raises(ValueError, match="expected a row at line 3, got ") as info:
        records.read(path)
    assert "\n" not in str(info.value)


def test_recorded_files_can_be_read():
    files = sorted(RESULTS.glob("*.csv"))
    assert files
    for path in files:
        assert records.read(path)


def test_groups_are_what_was_timed_in_turn():
    other = CASE._replace(shape="B=1")
    rows = [row(OURS, 1), row("a", 2), row(OURS, 3, case=other), row(OURS, 4), row(OURS, 5)]
    found = [[r.median_s for r in group.rows.values()] for group in records.groups(rows)]
    assert found == [[1, 2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("ours", "peer", "options", "code"),
    [
        (1.0, 2.0, [], 0),
        (10.0, 20.0, [], 0),  # a slower machine
        (1.05, 2.0, [], 0),
        (1.2, 2.0, [], 1),
        (1.2, 2.0, ["--tolerance", "0.5"], 0),
        (1.0, 1.6, ["--peer", "peer"], 1),
        (1.0, 2.0, ["--peer", "nobody"], 2),
        (1.0, 2.0, ["--provider", "nobody"], 2),
    ],
)
def test_ratios_are_compared_not_times(ours, peer, options, code, tmp_path, capsys):
    old = write(tmp_path / "old.csv", row(OURS, 1.0), row("peer", 2.0))
    new = write(tmp_path / "new.csv", row(OURS, ours), row("peer", peer))
    assert compare_results.main([str(old), str(new), *options]) == code
    out, error = capsys.readouterr()
    if code == 1:
        assert out.startswith("slower: elastic_attention forward float32 B=16 N=197: ours / peer")
    if code == 2:
        assert error.startswith("compare: expected cases of ") and error.count("\n") == 1


def test_what_became_wrong_is_slower(tmp_path, capsys):
    old = write(tmp_path / "old.csv", row(OURS, 1.0), row("peer", 2.0))
    new = write(tmp_path / "new.csv", row(OURS, status="wrong", note="off"), row("peer", 2.0))
    assert compare_results.main([str(old), str(new)]) == 1
    assert "wrong: off" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    for arguments in ([other, other], [tmp_path / "absent.csv", other]):
        assert compare_results.main([str(path) for path in arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def results(tmp_path):
    model = CaseKey("model", "forward", "float32", "")
    rows = [row(OURS, 0.002), row("best", 0.003), row("worse", 0.02)]
    slower = CASE._replace(shape="B=1")
    rows += [row(OURS, 0.002, case=slower), row("best", 0.001, case=slower)]
    rows.append(row("gone", case=slower, status="skipped", note="not | here"))
    for t in (0, 16, 32):
        case = model._replace(shape=f"V=Ti/32 B=8 tape={t}")
        rows += [row(OURS, 0.01 + t / 1e4, case=case), row("padded", 0.03, case=case)]
        rows.append(row("dense ViT, same rows", 0.001, case=case))
    write(tmp_path / "machine.csv", *rows)
    (tmp_path / "README.md").write_text(
        "before\n<!-- table: machine elastic_attention -->\nold\n<!-- /table -->\nbetween\n"
        "<!-- table: machine model forward tape=16; elastic_attention B=1 -->\n"
        "<!-- /table -->\nafter\n"
    )
    return tmp_path


def test_report_fills_marked_tables_and_writes_pages_and_plots(results, capsys):
    arguments = ["--results", str(results), "--readme", str(results / "README.md")]
    assert result_tables.main(arguments) == 0, capsys.readouterr().err
    text = (results / "README.md").read_text()
    assert text.startswith("before\n<!-- table: machine elastic_attention -->\n| op |")
    assert "\n<!-- /table -->\nbetween\n<!-- table" in text and text.endswith("-->\nafter\n")
    first, second = text.split("between")
    assert "| B=16 N=197 | 2 | 50 % | best | 1.50 |" in first
    assert "| B=1 | 2 | 50 % | best | 0.50 |" in first
    assert "| model |" not in first
    ends = [line.rpartition("| float32 ")[2] for line in second.splitlines() if "float32" in line]
    assert ends == [
        "| V=Ti/32 B=8 tape=16 | 11.6 | 50 % | padded | 2.59 |",
        "| B=1 | 2 | 50 % | best | 0.50 |",
    ]
    assert "B: examples in the batch; tape: " in second and "V: size and patch" in second
    assert "N: " in first and "N: " not in second
    assert "[machine](machine.md)." in first
    assert "dense ViT" not in text
    page = (results / "machine.md").read_text()
    assert "| worse | 20 | 18 | 22 | 10.00 |" in page
    assert "skipped: not / here" in page and "dense ViT, same rows" in page
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert (results / "machine-rows.png").read_bytes().startswith(b"\x89PNG")
    assert not (results / "machine-bank.png").exists()
    assert result_tables.main(arguments) == 0
    assert (results / "README.md").read_text() == text


def test_a_ratio_is_of_one_run():
    rows = [row(OURS, 1.0), row("peer", 2.0), row("other", 3.0)]
    later = [row(OURS, 10.0), row("compiled", 15.0)]
    found = result_tables.entries([*rows, *later])[CASE]
    ratios = {name: entry.ratio for name, entry in found.items()}
    assert ratios == {OURS: 1.0, "peer": 2.0, "other": 3.0, "compiled": 1.5}


def test_graphs_are_compared_with_graphs():
    rows = [row(OURS, 4.0), row("peer", 6.0), row("ours, capacity [graph]", 1.0)]
    rows.append(row("peer [graph]", 3.0))
    lines = result_tables.summary(result_tables.entries(rows)).splitlines()[2:]
    assert [line.split("|")[-3:-1] for line in lines] == [
        [" peer ", " 1.50 "],
        [" peer [graph] ", " 3.00 "],
    ]


def test_what_is_wrong_stands_in_the_table():
    rows = [row(OURS, status="wrong", note="off"), row("peer", 6.0)]
    assert result_tables.summary(result_tables.entries(rows)).splitlines()[2:] == [
        "| elastic_attention | forward | float32 | B=16 N=197 | wrong | | | |"
    ]


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        ("", [CASE]),
        ("elastic_attention", [CASE]),
        ("forward N=197", [CASE]),
        ("B=16; N=197", [CASE]),
    ],
)
def test_a_markers_selection_names_cases(selection, found):
    cases = result_tables.entries([row(OURS, 4.0), row("peer", 6.0)])
    assert list(result_tables.selected(cases, selection)) == found


@pytest.mark.parametrize("selection", ["model", "N=50", "elastic_attention N=50", "B=16;"])
def test_a_selection_that_names_no_case_is_an_error(selection):
    cases = result_tables.entries([row(OURS, 4.0), row("peer", 6.0)])
    with pytest.raises(ValueError, match="table: expected words of a recorded case, got "):
        result_tables.selected(cases, selection)


def test_a_marker_of_an_unknown_file_is_one_line(results, capsys):
    readme = results / "README.md"
    readme.write_text("<!-- table: elsewhere -->\n<!-- /table -->\n")
    assert result_tables.main(["--results", str(results), "--readme", str(readme)]) == 2
    error = capsys.readouterr().err
    assert error == "report: table: expected one of machine, got 'elsewhere'\n"


def run_gpu(monkeypatch, tmp_path, *steps, minutes=0.2):
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    start = time.monotonic()
    code = gpu.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--minutes", str(minutes)])
    return code, time.monotonic() - start


def python(program):
    return [sys.executable, "-c", program]


def test_a_gpu_run_ends_in_time_with_the_rows_that_it_has(monkeypatch, tmp_path, capsys):
    path = tmp_path / "out" / records.machine("cpu").file_name
    keep = GpuStep("build", [*python("import sys; print(*sys.argv[1:])"), gpu.SECONDS], 0.5)
    hangs = GpuStep("benchmarks", python("import time; time.sleep(60)"), 1.0)
    path.parent.mkdir()
    write(path, row(OURS, 0.002), row("peer", 0.003))
    code, seconds = run_gpu(monkeypatch, tmp_path, keep, hangs)
    out = capsys.readouterr().out
    assert code == 0 and seconds < 12
    assert "| B=16 N=197 | 2 | 50 % | peer | 1.50 |" in out
    assert out.splitlines()[-1].split()[:4] == ["benchmarks", "cut,", "no", "fault"]
    assert 0 <= int((tmp_path / "out/build.log").read_text()) <= 1  # of 2 seconds, half, most


@pytest.mark.parametrize("cut", [False, True])
def test_a_gpu_run_fails_when_a_step_does_and_goes_on(cut, monkeypatch, tmp_path, capsys):
    fails = "import time; time.sleep(60)" if cut else "print('why'); raise SystemExit(3)"
    tests = GpuStep("tests", python(fails), 0.4)
    last = GpuStep("benchmarks", python("print('measured')"), 1.0)
    code, _ = run_gpu(monkeypatch, tmp_path, tests, last)
    out = capsys.readouterr().out
    assert code == (0 if cut else 1)  # a step that is cut has not failed
    assert cut or "\nwhy\n" in out
    assert (tmp_path / "out/benchmarks.log").read_text() == "measured\n"


def test_the_steps_of_a_gpu_run(tmp_path):
    steps = {s.name: s for s in gpu.steps("cuda", tmp_path, "-m cuda")}
    assert list(steps) == ["build", "check", "tests", "benchmarks", "compiled peers"]
    tests, benchmarks = steps["tests"].command, steps["benchmarks"].command
    assert tests[tests.index("-m", 2) :][:2] == ["-m", "cuda"]
    assert benchmarks[3:] == [
        *("bench", "--device", "cuda", "--out", str(tmp_path)),
        *("--compiled", "no", "--budget", gpu.SECONDS),
    ]


def test_a_gpu_run_needs_a_folder_that_it_can_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu.main(["--out", str(tmp_path / "file/out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
