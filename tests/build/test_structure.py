"""The house rules that docs/design.md states: who may import whom, and what a name may mean."""

import ast
import collections
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adatape_kernels"
# Lowest first: a part may import what stands before it, and itself.
PARTS = (
    ("_build", "arguments", "offsets", "op_types", "pooling", "reentrant_checkpoint"),
    ("activations", "layout_checks", "tensor_methods"),
    ("reference",),
    ("elastic", "elastic_examples", "elastic_kept", "elastic_layout", "elastic_sources"),
    ("ops",),
    ("halting",),
    ("layers",),
    ("data",),
    ("models",),
    ("scenic",),
    ("timm",),
    ("recipes",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
MOST_LINES = 400
# Files that every room of ops may have.
ROOM_FILES = re.compile(r"(eager|compiled|triton_\w+)\.py|__init__\.py|__main__\.py|conftest\.py")


def tracked(*suffixes):
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout, which knows what belongs to the repository")
    paths = (ROOT / line for line in listed.stdout.splitlines())
    return [path for path in paths if path.suffix in suffixes and path.exists()]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """Yield what a file imports of the package, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    module: {found for found in imports_of(path) if found in MODULES}
    for module, path in MODULES.items()
}


def part_of(module):
    return module.split(".")[1] if "." in module else ""


def rank(module):
    name = part_of(module)
    return next((i for i, names in enumerate(PARTS) if name in names), None)


def test_every_part_has_a_rank():
    assert {m for m in MODULES if part_of(m) and rank(m) is None} == set()


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {found}"
        for module, imported in GRAPH.items()
        for found in imported
        if part_of(module) and part_of(found) and rank(found) > rank(module)
    ]
    assert not wrong


def circles():
    """Return the strongly connected components of the graph that have more than one module."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(GRAPH[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(component)

    for module in MODULES:
        if module not in index:
            visit(module)
    return found


def test_no_modules_import_each_other():
    """Not even inside a function, or for a type checker."""
    assert circles() == []


ROOMS = {
    m
    for m, p in MODULES.items()
    if p.name == "__init__.py" and m.startswith("adatape_kernels.ops.")
}


def test_a_room_imports_no_other_room():
    assert len(ROOMS) >= 6
    wrong = []
    for module, imported in GRAPH.items():
        own = next(
            (room for room in ROOMS if module == room or module.startswith(f"{room}.")), None
        )
        for found in imported:
            other = next((r for r in ROOMS if found == r or found.startswith(f"{r}.")), None)
            if own and other and own != other:
                wrong.append(f"{module} imports {found}")
    assert not wrong


def test_no_direction_imports_the_other():
    wrong = [
        f"{module} imports {found}"
        for module, imported in GRAPH.items()
        for found in imported
        for one, other in (("forward", "backward"), ("backward", "forward"))
        if module.endswith(f"triton_{one}") and found.endswith(f"triton_{other}")
    ]
    assert not wrong


def test_no_implementation_imports_another():
    kind = re.compile(r"(eager|compiled|triton)(_\w+)?")
    for module, imported in GRAPH.items():
        room, _, own = module.rpartition(".")
        if room in ROOMS and (mine := kind.fullmatch(own)):
            for found in imported:
                other = kind.fullmatch(found.rpartition(".")[2])
                if found.startswith(f"{room}.") and other:
                    assert other[1] == mine[1], f"{module} imports {found}"


def test_one_jump_leads_from_a_contract_to_each_of_its_implementations():
    for room in ROOMS:
        inside = {m for m in MODULES if m.startswith(f"{room}.")}
        directly = {m.rpartition(".")[2] for m in GRAPH[room] & inside}
        for name in ("eager", "compiled"):
            assert name in directly or f"{room}.{name}" not in MODULES, (room, name)


def test_files_are_short_or_say_why_not():
    long = []
    for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh"):
        lines = path.read_text().splitlines()
        if len(lines) > MOST_LINES and "lines because" not in "\n".join(lines[:10]):
            long.append(f"{path.relative_to(ROOT)}: {len(lines)}")
    assert not long


def test_a_file_name_occurs_once():
    names = collections.Counter(
        path.name
        for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh")
        if not ROOM_FILES.fullmatch(path.name)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_a_class_name_occurs_once():
    found = collections.defaultdict(set)
    for path in tracked(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(path.relative_to(ROOT))
    for path in tracked(".cpp", ".h", ".cu", ".cuh"):
        for name in re.findall(
            r"^(?:struct|class) (\w+) (?:final )?(?:: .*)?\{", path.read_text(), re.M
        ):
            found[name].add(path.relative_to(ROOT))
    twice = {name: sorted(map(str, paths)) for name, paths in found.items() if len(paths) > 1}
    assert not twice


def test_private_names_of_torch_stand_in_one_file():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "fast_autograd.py"
        for name in re.findall(r"torch(?:\.\w+)*\._[A-Za-z]\w*", path.read_text())
        # A user's own setting, named in texts; and where torch documents AOTInductor to be.
        if name not in ("torch._dynamo", "torch._inductor")
    ]
    assert not wrong


def test_the_package_holds_no_hooks_for_tests():
    """No library that an environment variable names, and no patch of a foreign module."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "load_library" not in text and "ADATAPE_CUDA_HOST" not in text, path
        assert not re.search(r"where tests|for tests(?! and trials)", text), path


def test_a_schema_is_written_once():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "STABLE_TORCH_LIBRARY(" not in text and "FRAGMENT" not in text, path
