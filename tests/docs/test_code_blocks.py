"""The Python blocks of README.md and of the pages in docs/ run, in the order of their page.

A block whose first line is a comment with a path of the package, like `# adatape_kernels/ops/x.py`,
is that file: it is written into a copy of the package, or behind what the file has there already.
Nothing else stands in for anything, so each page brings what its blocks use.
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
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# (adatape_kernels/\S+\.py)\n")

PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run_blocks(page, folder):
    """Run a page's blocks as one program in a process of its own; return it when it is done."""
    path, code = (
        PACKAGE.parent,
        ["import torch", "torch.manual_seed(0)", "torch.set_num_threads(1)"],
    )
    for block in blocks(page):
        file = FILE.match(block)
        if file is None:
            code.append(block)
            continue
        if path != folder:
            path = folder
            shutil.copytree(
                PACKAGE, path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")
            )
        target = path / file[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as stream:
            stream.write(block)
    program = folder / "blocks.py"
    program.write_text("\n".join(code), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, program], env=environment, cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_blocks_of_a_page_run(page, tmp_path):
    done = run_blocks(page, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pages_with_blocks_are_found():
    assert ROOT / "README.md" in [page for page in PAGES if blocks(page)]


def test_a_block_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2, 'x is one'\n```\n")
    assert "x is one" in run_blocks(page, tmp_path).stderr
