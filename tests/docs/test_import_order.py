"""Imports within the package point one way, as docs/design.md says."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adatape_kernels"

# A part may import from itself and from the parts behind it, never from one before it.
ORDER = ("cli", "recipes", "data", "scenic", "models", "layers", "ops", "reference", "elastic")

FILES = sorted(PACKAGE.rglob("*.py"))


def named(path):
    return str(path.relative_to(PACKAGE))


def module_of(path):
    """The module's parts below the package: ops/op.py is ("ops", "op"), a room its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """The parts, below the package, of every module that a file names in an import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == PACKAGE.name and parts:
                yield tuple(parts)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path):
    mine = module_of(path)
    if not mine or mine[0] not in ORDER:
        return
    allowed = ORDER[ORDER.index(mine[0]) :]
    wrong = [".".join(found) for found in imports(path) if found[0] in ORDER]
    assert [name for name in wrong if name.split(".")[0] not in allowed] == []


def rooms():
    return {path.name for path in (PACKAGE / "ops").iterdir() if (path / "__init__.py").exists()}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=named)
def test_a_room_imports_nothing_from_inside_another(path):
    """Nor does what rooms share import a room; `ops/__init__.py` alone imports them all."""
    mine = module_of(path)
    if mine == ("ops",):
        return
    own = mine[1] if mine[1] in rooms() else None
    others = [
        ".".join(found)
        for found in imports(path)
        if len(found) > 2 and found[0] == "ops" and found[1] in rooms() and found[1] != own
    ]
    assert others == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*/*.py")), ids=named)
def test_implementations_do_not_import_one_another(path):
    """Eager, compiled and Triton are chosen by the contract, and know nothing of each other."""

    def backend(name):
        return name if name in ("eager", "compiled") else name.split("_")[0]

    mine = backend(path.stem)
    if mine not in ("eager", "compiled", "triton"):
        return
    found = {backend(parts[2]) for parts in imports(path) if parts[0] == "ops" and len(parts) > 2}
    assert found & ({"eager", "compiled", "triton"} - {mine}) == set()
