"""Every example in a docstring of the package runs, and methods and properties have one too."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import adatape_kernels as ak

PACKAGE = Path(ak.__file__).parent
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if ">>>" in file.read_text()
)

CLASSES = [
    ak.ElasticBatch,
    *(getattr(ak.layers, name) for name in ak.layers.__all__),
    *(getattr(ak.models, name) for name in ak.models.__all__),
]
CLASSES = [found for found in CLASSES if inspect.isclass(found)]


@pytest.mark.parametrize("module", MODULES)
def test_examples_print_what_they_say(module, monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


def has_example(found):
    return "Example:\n" in (inspect.getdoc(found) or "")


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_a_public_class_and_its_methods_have_examples(found):
    assert has_example(found)
    for name, member in vars(found).items():
        public = isinstance(member, (property, classmethod)) or inspect.isfunction(member)
        if public and not name.startswith("_"):
            assert has_example(getattr(found, name) if isinstance(member, classmethod) else member)
