"""The code blocks of README.md and of the pages in docs/ run, in the order of their page.

A Python block whose first line is a comment with a path, as `# adatape_kernels/ops/new.py`, is that
file: it is written into a copy of the package, behind what the file has there already. A diff block
edits a file of that copy. Every other Python block is a part of one program, which runs at the end.
Nothing stands in for anything else: a page brings all that its blocks use.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import adatape_kernels

ROOT = Path(__file__).parents[2]
PACKAGE = Path(adatape_kernels.__file__).parent
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# (adatape_kernels/\S+\.py)\n+")

# A page that goes on where another ends, whose blocks then run with its own.
CONTINUED = {"adding-a-backend.md": ROOT / "docs/adding-an-op.md"}


def blocks(page):
    """(kind, text) of each block, those of the page that this one continues first."""
    before = blocks(CONTINUED[page.name]) if page.name in CONTINUED else []
    return before + BLOCK.findall(page.read_text(encoding="utf-8"))


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page not in CONTINUED.values() and blocks(page)
]


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


def run_blocks(page, folder):
    """Run a page's blocks in a process of its own; return it when it is done."""
    path = PACKAGE.parent
    code = ["import torch", "torch.manual_seed(0)", "torch.set_num_threads(1)"]
    for kind, text in blocks(page):
        file = FILE.match(text)
        if kind == "python" and file is None:
            code.append(text)
            continue
        if path != folder:
            path = folder
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE, path / PACKAGE.name, ignore=ignored)
        if kind == "diff":
            edit(path, text)
        else:
            write(path, file[1], text[file.end() :])
    program = folder / "blocks.py"
    program.write_text("\n".join(code), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, program], env=environment, cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path):
    done = run_blocks(page, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pages_with_blocks_are_found():
    found = {page.name for page in PAGES}
    assert {"README.md", "index.md", "using.md", "adding-a-backend.md"} <= found


def test_a_block_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2, 'x is one'\n```\n")
    assert "x is one" in run_blocks(page, tmp_path).stderr


def test_a_diff_that_does_not_fit_is_seen(tmp_path):
    page = tmp_path / "page.md"
    name = "adatape_kernels/elastic.py"
    page.write_text(f"```diff\n--- {name}\n+++ {name}\n-no such line\n+another\n```\n")
    with pytest.raises(AssertionError, match="fit in one place"):
        run_blocks(page, tmp_path)
