"""Take each check of the package away, one at a time, and see whether a test notices.

    python tests/mutation/remove_checks.py                # what Python checks
    python tests/mutation/remove_checks.py --cpp          # what C++ refuses, built anew each time
    python tests/mutation/remove_checks.py --list         # the sites, without running anything
    python tests/mutation/remove_checks.py dual_ffn cuda  # sites whose line has one of these in it

It works in a copy of the tracked files, below the temporary folder, with the compiled part that
this checkout has. A site is a condition of an `if` that raises (each operand of its `or`s alone),
or a call of a function that checks something; in C++ the condition in front of a `refuse`. The
tests are those of refusals, not the whole suite, so that a site takes seconds. No part of CI: it
takes half an hour, and says something new only where a check is new.
"""

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

# As in conftest.py, before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adatape_kernels"
CHECKED = [
    *sorted(PACKAGE.glob("ops/**/*.py")),
    *sorted(PACKAGE.glob("layers/*.py")),
    *sorted(PACKAGE.glob("elastic*.py")),
    *(PACKAGE / name for name in ("arguments.py", "offsets.py", "tensor_methods.py")),
]
CUDA_HOST = "build/cuda_host/adatape_cuda_host.so"
LOG = "mutation.log"
# The tests of a site take this many seconds at most; some mutants would run for ever.
TIMEOUT = 300


class CheckSite(NamedTuple):
    """A piece of a file, and what takes its place."""

    path: str
    line: int
    start: int
    end: int
    replacement: str
    text: str

    def __str__(self):
        return f"{self.path}:{self.line}: {' '.join(self.text.split())}"


def operands_of(condition):
    """The operands of a condition's `or`s, those behind an `and` too; the condition without any."""
    if isinstance(condition, ast.BoolOp):
        if isinstance(condition.op, ast.Or):
            return condition.values
        return operands_of(condition.values[-1]) if _ends_in_or(condition) else [condition]
    return [condition]


def _ends_in_or(condition):
    last = condition.values[-1]
    return isinstance(last, ast.BoolOp) and isinstance(last.op, ast.Or)


def python_sites(path):
    source = (ROOT / path).read_text()
    # ast counts columns in bytes of UTF-8.
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def site(node, replacement):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = source.encode()[start:end].decode()
        return CheckSite(path, node.lineno, start, end, replacement, text)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
            yield from (site(operand, "False") for operand in operands_of(node.test))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func).rpartition(".")[2]
            if re.match(r"_?check_", called):
                yield site(node, "pass")


def cpp_sites(path):
    source = (ROOT / path).read_text()
    # The condition may stand on the line of the refusal, or close a brace before it.
    for found in re.finditer(r"\bif \((?=(?:(?!\bif \().)*?\)\s*\{?\s*refuse\()", source, re.S):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        if re.match(r"\s*\{?\s*refuse\(", source[end:]):
            yield from cpp_operands(path, source, found.end(), end - 1)


def cpp_operands(path, source, start, end):
    """A site for each operand of the `||`s that stand in no parentheses."""
    depth, first = 0, start
    for i in range(start, end + 1):
        depth += {"(": 1, ")": -1}.get(source[i], 0) if i < end else 0
        if i == end or (depth == 0 and source.startswith("||", i)):
            text = source[first:i]
            line = source[:first].count("\n") + 1
            before, after = len(source[:first].encode()), len(source[:i].encode())
            yield CheckSite(path, line, before, after, f"(false && ({text}))", text)
            first = i + 2


def sites(cpp):
    if cpp:
        for path in sorted((ROOT / "csrc").rglob("*.c*")):
            yield from cpp_sites(str(path.relative_to(ROOT)))
        return
    for path in CHECKED:
        yield from python_sites(str(path.relative_to(ROOT)))


ROOMS = ("tape_select", "tape_gather", "elastic_attention", "dual_ffn", "add_layer_norm")
ROW_ROOMS = ("compact_rows", "accumulate_rows")


def tests_of(path):
    """The tests that may notice: those of what is refused."""
    wrong_arguments = "tests/layers/test_wrong_arguments.py"
    if path.endswith(("elastic_examples.py", "elastic_layout.py", "tensor_methods.py")):
        return ["tests/test_elastic_examples.py", "tests/test_tensor_methods.py"]
    if path.endswith("row_kinds.py"):
        return ["tests/layers/test_row_kinds.py"]
    if path.endswith(("elastic.py", "offsets.py")):
        refusals = of("elastic_attention_refusals")
        examples = "tests/test_elastic_examples.py"
        return ["tests/test_elastic_refusals.py", examples, refusals, wrong_arguments]
    if path.endswith("arguments.py") or "layers" in path:
        return [wrong_arguments, "tests/layers/test_layers.py"]
    if "op_checks" in path or "attention_checks" in path or "tensor_checks" in path:
        return [of("hostile_calls")]
    if path.endswith("reading_checks.py"):
        return [of("tape_select_refusals"), of("tape_gather_refusals"), of("tape_read")]
    if "tape_read" in path:
        return [of("tape_read")]
    if path.endswith("row_checks.py"):
        return [of(f"{room}_refusals") for room in ROW_ROOMS]
    if path.endswith("qkvpacked.py"):
        return [of("attention_qkvpacked_refusals")]
    for room in ROW_ROOMS:
        if room in path:
            return [of(f"{room}_refusals")]
    for room in ROOMS:
        if room in path:
            return [of(f"{room}_refusals"), wrong_arguments]
    return [of("use_backend"), of("op"), of("implementation"), of("compiled_part")]


def of(name):
    return f"tests/ops/test_{name}.py"


class Copy:
    """A copy of the repository in which one check is missing."""

    def __init__(self, folder, cpp):
        self.root, self.cpp = Path(folder), cpp
        listed = "git ls-files --cached --others --exclude-standard".split()
        paths = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        built = [str(path.relative_to(ROOT)) for path in PACKAGE.glob("_C*")]
        for path in [*paths.splitlines(), *built, CUDA_HOST]:
            if (ROOT / path).exists():
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, self.root / path)
        if cpp:
            python = f"-DPython_EXECUTABLE={sys.executable}"
            self.call(*"cmake -S . -B build/cpp -G Ninja".split(), python)
            self.build()

    def call(self, *command):
        # The environment's own CMake, also where that is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path}
        result = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError(f"{command[0]}: {result.stdout[-2000:]}{result.stderr[-2000:]}")

    def build(self):
        self.call(*"cmake --build build/cpp --target all adatape_cuda_host".split())
        self.call(*"cmake --install build/cpp --prefix .".split())
        (self.root / CUDA_HOST).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.root / "build/cpp" / Path(CUDA_HOST).name, self.root / CUDA_HOST)

    def notices(self, site):
        """Whether a test fails without the check."""
        file = self.root / site.path
        whole = file.read_bytes()
        try:
            file.write_bytes(whole[: site.start] + site.replacement.encode() + whole[site.end :])
            if self.cpp:
                self.build()
            return self.fails(tests_of(site.path))
        finally:
            file.write_bytes(whole)

    def fails(self, tests):
        """Run tests in a process that is forked from this one, which has imported torch."""
        runner = multiprocessing.get_context("fork").Process(target=self.run, args=(tests,))
        runner.start()
        runner.join(TIMEOUT)
        if runner.is_alive():
            runner.kill()
            runner.join()
        # 2: a test module cannot be imported; below 0: a signal ended it.
        if runner.exitcode > 2:
            raise RuntimeError(f"pytest: exit {runner.exitcode}, see {self.root / LOG}")
        return runner.exitcode != 0

    def run(self, tests):
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        sys.dont_write_bytecode = True
        with open(LOG, "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        options = "-x -q -n 0 -p no:cacheprovider".split()
        code = pytest.main([*options, "-m", "not compiles", *tests])
        sys.stdout.flush()
        os._exit(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpp", action="store_true", help="what C++ refuses")
    parser.add_argument("--list", action="store_true", help="print the sites")
    parser.add_argument("parts", nargs="*", help="parts of the names of sites; all without any")
    options = parser.parse_args()
    chosen = [
        site
        for site in sites(options.cpp)
        if not options.parts or any(part in str(site) for part in options.parts)
    ]
    if options.list:
        print(*chosen, sep="\n")
        return
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder, options.cpp)
        for tests in {tuple(tests_of(site.path)) for site in chosen}:
            if copy.fails(tests):
                raise RuntimeError(f"{' '.join(tests)}: expected to pass with every check in place")
        for site in chosen:
            noticed = copy.notices(site)
            survivors += not noticed
            print(f"{'noticed ' if noticed else 'SURVIVED'} {site}", flush=True)
    print(f"{len(chosen)} checks, {survivors} of which no test notices")


if __name__ == "__main__":
    main()
