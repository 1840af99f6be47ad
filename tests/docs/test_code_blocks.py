"""The code blocks of README.md and of the pages in docs/ run, in the order of their page.

A Python block whose first line is a comment with a path, as `# adatape_kernels/ops/new.py`, is that
file: it is written into a copy of the repository, behind what the file has there already. A diff
block edits a file of that copy. Every other Python block is a part of one program, which runs at
the end, and after it the tests that the page has written run. A page that writes no such file runs
in this process. Nothing stands in for anything else: a page brings all that its blocks use, save
for the files that `bring` makes, whose names README gives to what a reader has.

A line of a page that begins with `adatape-kernels` is a command that exists, with options that do.
"""

import re
import shlex
import shutil
from pathlib import Path

import forked_python
import pytest
import torch

import adatape_kernels
from adatape_kernels.cli import command_line

ROOT = Path(__file__).parents[2]
PACKAGE = Path(adatape_kernels.__file__).parent
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# ((?:adatape_kernels|tests)/\S+\.py)\n+")
# What a copy leaves out: no block is about it, and some of it is large.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "golden", "cuda_host", "results")

# A page that goes on where another ends, whose blocks then run with its own.
CONTINUED = {"adding-a-backend.md": ROOT / "docs/adding-an-op.md"}


def blocks(page):
    """(kind, text) of each block, those of the page that this one continues first."""
    before = blocks(CONTINUED[page.name]) if page.name in CONTINUED else []
    return before + BLOCK.findall(page.read_text(encoding="utf-8"))


PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs/guides").glob("*.md")),
    )
    if page not in CONTINUED.values() and blocks(page)
]


def writes_files(page):
    return any(kind == "diff" or FILE.match(text) for kind, text in blocks(page))


def program(page):
    """The page's blocks at the lines where they stand in the page, so that errors name these."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


def bring(folder):
    """Make what README's reader has: a trained run, a picture and a pretrained ViT; and rows."""
    image = pytest.importorskip("PIL.Image")
    save_file = pytest.importorskip("safetensors.torch").save_file
    sizes = {"dim": 12, "depth": 1, "num_heads": 6, "ffn_dim": 12, "image_size": 8}
    model = adatape_kernels.models.adatape_vit("Ti/4", **sizes, in_channels=1, num_classes=10)
    model.preprocessing = adatape_kernels.data.Preprocessing(8, 1, (0.5,), (0.5,))
    adatape_kernels.save(model, folder / "runs/digits", class_names="0123456789")
    image.new("L", (8, 8)).save(folder / "seven.png")
    shapes = {"patch_embed.proj": (12, 1, 4, 4), "norm": (12,), "head": (10, 12)}
    shapes |= {f"blocks.0.{name}": (12,) for name in ("norm1", "norm2")}
    shapes |= {"blocks.0.attn.qkv": (36, 12), "blocks.0.attn.proj": (12, 12)}
    shapes |= {"blocks.0.mlp.fc1": (12, 12), "blocks.0.mlp.fc2": (12, 12)}
    vit = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    vit |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    save_file({**vit, "pos_embed": torch.randn(1, 4, 12)}, folder / "vit.safetensors")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")


def write(folder, name, text):
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as stream:
        stream.write(text)


def edit(folder, diff):
    """Apply a diff block, whose first two lines name the file; it must fit in one place."""
    named, _, *lines = diff.splitlines()
    target = folder / named.removeprefix("--- ")
    text = target.read_text(encoding="utf-8")
    old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert text.count(old) == 1, f"{named}: expected the diff to fit in one place:\n{old}"
    target.write_text(text.replace(old, new), encoding="utf-8")


def copy_repository(folder):
    """Copy the package that is tested, and what lies beside it in the repository."""
    for source in (PACKAGE, *(ROOT / name for name in ("benchmarks", "docs", "tests"))):
        shutil.copytree(source, folder / source.name, ignore=LEFT_OUT)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_blocks(page, folder):
    """Run a page's blocks, if it has any, and the tests among them in processes of their own.

    Returns the last one when it is done: the first that failed, or else the tests.
    """
    path, tests, code = PACKAGE.parent, [], []
    for kind, text in blocks(page):
        file = FILE.match(text)
        if kind == "python" and file is None:
            code.append(text)
            continue
        if path != folder:
            path = folder
            copy_repository(folder)
        if kind == "diff":
            edit(path, text)
        else:
            write(path, file[1], text[file.end() :])
            tests += [file[1]] if file[1].startswith("tests/") else []
    done = None
    if code or not tests:
        program = folder / "blocks.py"
        begun = ["import torch", "torch.manual_seed(0)", "torch.set_num_threads(1)"]
        program.write_text("\n".join([*begun, *code]), encoding="utf-8")
        done = run_python(path, folder, program)
    if tests and (done is None or done.returncode == 0):
        return run_python(path, folder, "-m", "pytest", "-q", *tests)
    return done


def run_python(path, folder, *arguments):
    """Run Python, which finds the package that is tested or the copy of it in `path`."""
    copy = None if path == PACKAGE.parent else path
    return forked_python.run(arguments, cwd=folder, copy=copy, capture_output=True, text=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    if writes_files(page):
        done = run_blocks(page, tmp_path)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return
    bring(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(program(page), page, "exec"), {"__name__": "__main__"})


def test_pages_with_blocks_are_found():
    found = {page.name for page in PAGES}
    assert {"README.md", "index.md", "using.md", "adding-a-backend.md"} <= found
    assert {page.name for page in (ROOT / "docs/guides").glob("*.md")} <= found


COMMANDS = sorted(
    {
        line.strip()
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"))
        for line in re.findall(r"^(?: {4}|\$ )?(adatape-kernels .*)", page.read_text(), flags=re.M)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_exists(line):
    words = shlex.split(line, comments=True)[1:]
    command_line().parse_args(words[:1] if words[0] == "bench" else words)


def test_commands_are_found_and_others_refused():
    assert any(line.startswith("adatape-kernels finetune --source") for line in COMMANDS)
    with pytest.raises(SystemExit):
        test_a_command_of_a_page_exists(
            "adatape-kernels train --data digits --teach 3  # no option"
        )


def test_an_error_names_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nx = y\n```\n")
    with pytest.raises(NameError) as error:
        exec(compile(program(page), page, "exec"), {})
    assert error.traceback[-1].lineno == 9  # counted from 0


def test_a_block_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2, 'x is one'\n```\n")
    assert "x is one" in run_blocks(page, tmp_path).stderr


def test_a_test_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n# tests/test_new.py\ndef test_it():\n    assert 1 == 2\n```\n")
    assert "1 failed" in run_blocks(page, tmp_path).stdout


def test_a_diff_that_does_not_fit_is_seen(tmp_path):
    page = tmp_path / "page.md"
    name = "adatape_kernels/elastic.py"
    page.write_text(f"```diff\n--- {name}\n+++ {name}\n-no such line\n+another\n```\n")
    with pytest.raises(AssertionError, match="fit in one place"):
        run_blocks(page, tmp_path)
