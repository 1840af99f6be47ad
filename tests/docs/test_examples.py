"""Every public object has an example in its docstring, and the examples print what they say."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import adatape_kernels as ak

# Of a module without `__all__`, what the reference shows.
SHOWN = {"adatape_kernels.scenic": ("load", "load_file")}


def members(module):
    """The public members of a module by their names."""
    names = getattr(module, "__all__", None) or SHOWN[module.__name__]
    return {name: getattr(module, name) for name in names}


def public_objects():
    """Every function and class that the reference shows, and ElasticBatch's methods, by name."""
    found = {}
    for name, member in members(ak).items():
        if inspect.ismodule(member):
            found |= {f"{name}.{inner}": given for inner, given in members(member).items()}
        else:
            found[name] = member
    # Its methods, those of the classes that it extends among them, are shown with it.
    for name, method in inspect.getmembers(ak.ElasticBatch, inspect.isroutine):
        if not name.startswith("_"):
            found[f"ElasticBatch.{name}"] = method
    # What else there is, constants and modules, has no docstring that could hold an example.
    return {n: m for n, m in found.items() if inspect.isclass(m) or inspect.isroutine(m)}


OBJECTS = public_objects()


def has_example(member):
    return re.search(r"^Example:\n+ +>>> ", inspect.getdoc(member) or "", re.M) is not None


def test_the_public_objects_are_found():
    expected = ["use_backend", "ElasticBatch", "ElasticBatch.from_padded", "ElasticBatch.pool"]
    expected += ["ops.tape_select", "ops.dual_ffn", "ops.FFN", "layers.TapeReader"]
    expected += ["models.adatape_vit", "models.AdaTapeOutput", "scenic.load"]
    assert [name for name in expected if name not in OBJECTS] == []


def test_the_reference_shows_every_public_object():
    pages = (Path(__file__).parents[2] / "docs/api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    directives = r"^\.\. auto(?:class|function):: (?:adatape_kernels\.)?(?:\w+\.)*(\w+)$"
    shown = set(re.findall(directives, text, flags=re.M))
    # A method is shown with its class.
    names = [name.split(".")[0 if name.startswith("ElasticBatch.") else -1] for name in OBJECTS]
    assert [name for name in names if name not in shown] == []


def test_every_public_object_has_an_example():
    without = [name for name in OBJECTS if not has_example(OBJECTS[name])]
    assert without == [], f"without an `Example:` section: {', '.join(without)}"


@pytest.mark.parametrize("name", [name for name in OBJECTS if has_example(OBJECTS[name])])
def test_an_example_prints_what_it_says(name):
    """It runs by itself: it imports what it uses."""
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(OBJECTS[name]), {}, name, None, None)
    runner, report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    torch.manual_seed(0)
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
